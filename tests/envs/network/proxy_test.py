"""The proxy by raw bytes, on this machine's own loopback: a sandbox is not needed for it."""

import asyncio
import contextlib
import socket
import threading
import time

import pytest

from rome.envs.network import proxy
from rome.envs.network.attempts import AttemptLog
from rome.envs.network.gate import Gate
from rome.envs.network.policy import NetworkPolicy
from tests.envs.network.servers import ask, echo, pages, receive_all


@pytest.fixture(scope="module")
def world():
  with pages() as web, echo() as raw:
    yield web, raw


@contextlib.contextmanager
def proxied(*allow, **settings):
  """A proxy in a thread. Yields its port and its gate."""
  gate = Gate(NetworkPolicy(allow=allow, **settings), AttemptLog("box"))
  loop = asyncio.new_event_loop()

  async def start():
    async def accepted(reader, writer):
      try:
        await proxy.serve(gate, (reader, writer))
      except OSError:
        pass
      finally:
        writer.close()

    return await asyncio.start_server(accepted, "127.0.0.1", 0)

  server = loop.run_until_complete(start())
  thread = threading.Thread(target=loop.run_forever)
  thread.start()
  try:
    yield server.sockets[0].getsockname()[1], gate
  finally:
    asyncio.run_coroutine_threadsafe(_end(server), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def _end(server):
  server.close()
  tasks = asyncio.all_tasks() - {asyncio.current_task()}
  for task in tasks:
    task.cancel()
  await asyncio.gather(*tasks, return_exceptions=True)


def outcomes(gate):
  return [(a.kind, a.destination, a.allowed, a.reason) for a in gate.log.attempts()]


def status(answer):
  return int(answer.split(b" ", 2)[1])


def test_requests_pass_without_what_is_for_the_proxy(world):
  web, _ = world
  with proxied(f"127.0.0.1:{web}") as (port, gate):
    answer = ask(
      port,
      b"GET http://127.0.0.1:%d/a?b#c HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
      b"Proxy-Connection: keep-alive\r\nProxy-Authorization: secret\r\n"
      b"Connection: X-Drop, Content-Length\r\nX-Drop: 1\r\nX-Keep: 2\r\nUpgrade: websocket\r\n\r\n"
      % (web, web),
    )
    assert status(answer) == 200 and b"GET /a?b\n" in answer and b"x-keep: 2" in answer
    assert b"secret" not in answer and b"x-drop" not in answer and b"pgrade" not in answer
    (attempt,) = gate.log.attempts()
    assert (attempt.kind, attempt.allowed, attempt.reason) == ("http", True, "")
    assert (
      attempt.sent > 50 and attempt.received > 100 and gate.spent == attempt.sent + attempt.received
    )


def test_one_connection_many_requests(world):
  web, _ = world
  base = b"http://127.0.0.1:%d" % web
  host = b"Host: 127.0.0.1:%d\r\n" % web
  with proxied(f"127.0.0.1:{web}") as (port, gate):
    answer = ask(
      port,
      b"GET " + base + b"/one HTTP/1.1\r\n" + host + b"\r\n",
      b"HEAD " + base + b"/two HTTP/1.1\r\n" + host + b"\r\n",
      b"POST " + base + b"/ HTTP/1.1\r\n" + host + b"Content-Length: 5\r\n\r\nabcde",
      b"POST "
      + base
      + b"/ HTTP/1.1\r\n"
      + host
      + b"Transfer-Encoding: chunked\r\n\r\n3\r\nxyz\r\n0\r\n\r\n",
      b"POST "
      + base
      + b"/ HTTP/1.1\r\n"
      + host
      + b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\nq",
      b"GET " + base + b"/chunked HTTP/1.0\r\n\r\n",
    )
    assert answer.count(b"HTTP/1.1 200") == 6 and b"HTTP/1.1 100" in answer
    assert b"GET /one" in answer and b"/two" not in answer and b"hello world" in answer
    assert (
      b"posted 5 b'abcde'" in answer and b"posted 3 b'xyz'" in answer and b"posted 1 b'q'" in answer
    )
    assert len(gate.log.attempts()) == 6


def test_a_large_body_each_way(world):
  web, _ = world
  size = 5 << 20
  with proxied(f"127.0.0.1:{web}") as (port, gate):
    head = b"POST http://127.0.0.1:%d/ HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % (web, web)
    answer = ask(port, head + b"Content-Length: %d\r\n\r\n" % size, b"z" * size)
    assert b"posted %d " % size in answer
    assert gate.log.attempts()[0].sent > size


GET = b"GET http://127.0.0.1:PORT/ HTTP/1.1\r\n"
POST = b"POST http://127.0.0.1:PORT/ HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n"
REFUSED = {
  "another host": (b"GET http://evil.test/ HTTP/1.1\r\nHost: evil.test\r\n\r\n", 403),
  "another port": (b"GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n", 403),
  "CONNECT elsewhere": (b"CONNECT evil.test:22 HTTP/1.1\r\nHost: evil.test:22\r\n\r\n", 403),
  "hexadecimal": (b"CONNECT 0x7f.1:PORT HTTP/1.1\r\nHost: 0x7f.1:PORT\r\n\r\n", 400),
  "one number": (b"CONNECT 2130706433:PORT HTTP/1.1\r\nHost: 2130706433:PORT\r\n\r\n", 400),
  "octal": (b"CONNECT 0177.0.0.1:PORT HTTP/1.1\r\nHost: 0177.0.0.1:PORT\r\n\r\n", 400),
  "three parts": (b"CONNECT 127.0.1:PORT HTTP/1.1\r\nHost: 127.0.1:PORT\r\n\r\n", 400),
  "mapped": (b"CONNECT [::ffff:127.0.0.2]:PORT HTTP/1.1\r\n"
             b"Host: [::ffff:127.0.0.2]:PORT\r\n\r\n", 403),
  "zone": (b"CONNECT [fe80::1%25lo]:PORT HTTP/1.1\r\nHost: [fe80::1%25lo]:PORT\r\n\r\n", 400),
  "no port": (b"CONNECT 127.0.0.1 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 400),
  "port zero": (b"CONNECT 127.0.0.1:0 HTTP/1.1\r\nHost: 127.0.0.1:0\r\n\r\n", 400),
  "user name": (b"GET http://127.0.0.1:PORT@evil.test/ HTTP/1.1\r\nHost: evil.test\r\n\r\n", 400),
  "backslash": (b"GET http://127.0.0.1:PORT\\@evil.test/ HTTP/1.1\r\nHost: evil.test\r\n\r\n", 400),
  "Host differs": (GET + b"Host: evil.test\r\n\r\n", 400),
  "Host's port differs": (GET + b"Host: 127.0.0.1:1\r\n\r\n", 400),
  "CONNECT's Host differs": (b"CONNECT 127.0.0.1:PORT HTTP/1.1\r\nHost: evil.test\r\n\r\n", 400),
  "two Hosts": (GET + b"Host: 127.0.0.1:PORT\r\nHost: b\r\n\r\n", 400),
  "no Host": (GET + b"\r\n", 400),
  "origin form": (b"GET / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n", 400),
  "https by GET": (b"GET https://127.0.0.1:PORT/ HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n", 400),
  "file": (b"GET file:///etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n", 400),
  "both framings": (POST + b"Content-Length: 4"
                    b"\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
  "two lengths": (POST + b"Content-Length: 4"
                  b"\r\nContent-Length: 5\r\n\r\nabcde", 400),
  "odd framing": (POST + b""
                  b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
  "space before colon": (GET + b"Host : 127.0.0.1:PORT\r\n\r\n", 400),
  "folded header": (GET + b"Host: evil.test\r\n 127.0.0.1:PORT\r\n\r\n", 400),
  "garbage": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
  "NUL": (b"GET http://127.0.0.1:PORT/\0 HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n", 400),
  "header bomb": (GET + b"" + b"X: y\r\n" * 20000, 431),
  "long line": (b"GET http://127.0.0.1:PORT/" + b"a" * 100000, 431),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(world, what):
  web, _ = world
  message, code = REFUSED[what]
  with proxied(f"127.0.0.1:{web}") as (port, gate):
    answer = ask(port, message.replace(b"PORT", b"%d" % web))
    assert status(answer) == code and answer.count(b"rome: refused") == 1
    ((_, destination, allowed, reason),) = outcomes(gate)
    assert not allowed and reason and gate.spent == 0 and len(destination) < 400


def test_a_name_that_leads_to_the_loopback(world):
  web, _ = world
  request = b"CONNECT LocalHost.:%d HTTP/1.1\r\nHost: localhost:%d\r\n\r\n" % (web, web)
  with proxied(f"localhost:{web}") as (port, gate):
    assert status(ask(port, request)) == 403
    ((_, destination, allowed, reason),) = outcomes(gate)
    assert destination == f"localhost:{web}" and not allowed and "not public" in reason
  with proxied(f"localhost:{web}", f"127.0.0.1:{web}") as (port, gate):
    assert status(ask(port, request, b"GET / HTTP/1.0\r\n\r\n")) == 200
    assert outcomes(gate)[0][2:] == (True, "")


def test_tunnels_pass_bytes_and_ends(world):
  """Early bytes, and the end of one direction while the other goes on."""
  _, raw = world
  with proxied(f"127.0.0.1:{raw}") as (port, gate):
    answer = ask(
      port, b"CONNECT [::ffff:127.0.0.1]:%d HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nearly" % raw
    )
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert status(head) == 200 and rest == b"earlybye" and b"chunked" not in head
    (attempt,) = gate.log.attempts()
    assert (attempt.kind, attempt.sent, attempt.received) == ("connect", 5, 8)
    assert attempt.destination == f"127.0.0.1:{raw}"


def test_nobody_listens_at_an_allowed_place():
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    closed = taken.getsockname()[1]
    with proxied(f"127.0.0.1:{closed}") as (port, gate):
      request = b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % closed
      assert status(ask(port, request)) == 502
      ((_, _, allowed, reason),) = outcomes(gate)
      assert allowed and "no connection" in reason


def test_a_slow_head_is_not_waited_for(world, monkeypatch):
  monkeypatch.setattr(proxy, "HEAD_TIMEOUT", 0.3)
  with proxied("127.0.0.1:1") as (port, _), socket.create_connection(("127.0.0.1", port)) as slow:
    start = time.monotonic()
    slow.settimeout(20)
    with contextlib.suppress(OSError):
      for byte in b"GET http://127.0.0.1:1/ HTTP/1.1\r\n" * 10:
        slow.send(bytes([byte]))
        time.sleep(0.02)
        if time.monotonic() - start > 0.5:
          break
    assert status(receive_all(slow)) == 408
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("setting", ["idle_timeout", "total_timeout"])
def test_connections_end_in_time(world, setting):
  _, raw = world
  with proxied(f"127.0.0.1:{raw}", **{setting: 0.4}) as (port, gate):
    with socket.create_connection(("127.0.0.1", port), 20) as tunnel:
      tunnel.sendall(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % raw)
      start = time.monotonic()
      tunnel.settimeout(0.1)
      ended = False
      while not ended and time.monotonic() - start < 20:
        try:
          if setting == "total_timeout":
            tunnel.sendall(b"x")  # never idle
          ended = not tunnel.recv(1 << 16)
        except TimeoutError:
          pass
        except OSError:
          ended = True
      assert ended and time.monotonic() - start > 0.3
    wanted = "idle for 0.4 s" if setting == "idle_timeout" else "total_timeout is over"
    assert outcomes(gate)[0][3] == wanted


def test_the_budget_of_bytes(world):
  _, raw = world
  connect = b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % raw
  with proxied(f"127.0.0.1:{raw}", max_bytes=100_000) as (port, gate):
    with contextlib.suppress(OSError):
      answer = ask(port, connect, b"x" * 1_000_000)
      assert len(answer) < 200_000
    assert outcomes(gate)[0][2:] == (False, "max_bytes of the episode are spent")
    assert status(ask(port, connect)) == 403
    assert gate.spent < 100_000 + (1 << 19)


def test_a_server_that_breaks_off_or_babbles():
  answers = [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", b"nonsense\r\n\r\n",
             b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na"]  # fmt: skip
  with socket.create_server(("127.0.0.1", 0)) as server:

    def serve():
      for answer in answers:
        connection, _ = server.accept()
        with connection:
          connection.recv(1 << 16)
          connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    target = server.getsockname()[1]
    with proxied(f"127.0.0.1:{target}") as (port, gate):
      request = b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % (
        target,
        target,
      )
      codes = [status(ask(port, request)) for _ in answers]
      assert codes == [502, 200, 502, 502]  # of a broken answer the head is gone already
      assert all(allowed and "malformed" in reason for _, _, allowed, reason in outcomes(gate))
    thread.join(10)
