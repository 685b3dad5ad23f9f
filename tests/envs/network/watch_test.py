"""Direct attempts are noted by rocklet, whatever the kernel then says to them."""

import textwrap
import time

import pytest

from tests.envs.network.namespace import PYTHON, namespaced


@pytest.fixture(scope="module")
def shared():
  with namespaced() as sandbox:
    yield sandbox


@pytest.fixture
def sandbox(shared):
  shared.reset()
  return shared


def python(sandbox, script, timeout=30):
  sandbox.write_file("s.py", textwrap.dedent(script).encode())
  result = sandbox.run(f"{PYTHON} s.py", timeout)
  assert result.exit_code == 0, result
  return result.output


def direct(sandbox):
  return {(a.destination, a.reason.split(":")[0]): a.count for a in sandbox.attempts()}


def test_every_way_to_name_an_address(sandbox):
  output = python(
    sandbox,
    """
    import socket
    tcp = socket.create_server(("192.0.2.1", 7001))
    socket.create_connection(("192.0.2.1", 7001)).close()
    for _ in range(3):
      try: socket.create_connection(("192.0.2.1", 7002))
      except ConnectionRefusedError: pass
    v6 = socket.socket(socket.AF_INET6)
    try: v6.connect(("2001:db8::1", 7003))
    except ConnectionRefusedError: pass
    mapped = socket.socket(socket.AF_INET6)
    try: mapped.connect(("::ffff:192.0.2.1", 7004))
    except ConnectionRefusedError: pass
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.sendto(b"x", ("192.0.2.1", 7005))
    udp2 = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp2.sendmsg([b"x"], [], 0, ("192.0.2.1", 7006))
    for family, kind in ((40, 1), (17, 3), (38, 5)):
      try: socket.socket(family, kind); print("opened")
      except OSError as error: print(error.errno)
    print("end")
    """,
  )
  assert output == "97\n97\n97\nend\n"
  found = sandbox.attempts()
  assert sandbox.attempts() == found  # each is told once
  sockets = [a for a in found if a.destination.startswith("socket(")]
  assert {a.destination.split(",")[0] for a in sockets} == {
    "socket(family=AF_VSOCK", "socket(family=AF_PACKET", "socket(family=AF_ALG",
  }  # fmt: skip
  places = {(a.destination, a.reason, a.count) for a in found if a not in sockets}
  assert places == {
    ("192.0.2.1:7001", "connect: no route", 1),
    ("192.0.2.1:7002", "connect: no route", 3),
    ("[2001:db8::1]:7003", "connect: no route", 1),
    ("192.0.2.1:7004", "connect: no route", 1),
    ("192.0.2.1:7005", "send: no route", 1),
    ("192.0.2.1:7006", "send: no route", 1),
  }
  assert all(a.kind == "direct" and not a.allowed for a in found)
  assert abs(found[0].time - time.time()) < 120
  assert sandbox.stats()["watching"] == 1


def test_loopback_and_local_sockets_are_not_noted(sandbox):
  python(
    sandbox,
    """
    import os, socket
    for address in ("127.0.0.1", "127.9.9.9", "0.0.0.0"):
      try: socket.create_connection((address, 1), 5)
      except ConnectionRefusedError: pass
    for address in ("::1", "::", "::ffff:127.0.0.1"):
      try: socket.create_connection((address, 1), 5)
      except ConnectionRefusedError: pass
    path = os.path.abspath("a-socket-with-a-long-name")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    server.bind(path)
    client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    client.sendto(b"x", path)
    client.connect(path)
    client.sendmsg([b"x"])
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.connect(("127.0.0.1", 9))
    """,
  )
  assert sandbox.attempts() == []


def test_messages_by_the_batch_and_addresses_that_hide(sandbox):
  """sendmmsg, of more messages than are read at once and with the last at the end of what can be
  read; a family left out; an address that cannot be read."""
  python(
    sandbox,
    """
    import ctypes, mmap, socket, struct
    libc = ctypes.CDLL(None, use_errno=True)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    def address(port, family=2):
      return struct.pack("<H", family) + struct.pack(">H4B8x", port, 192, 0, 2, 1)
    count, names = 21, []
    area = mmap.mmap(-1, 8192)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc.mprotect(ctypes.c_void_p(start + 4096), 4096, 0)
    headers = b""
    for i in range(count):
      names.append(ctypes.create_string_buffer(address(7100 + i)))
      headers += struct.pack("<QI52x", ctypes.addressof(names[-1]), 16)
    assert len(headers) == 64 * count
    at = start + 4096 - len(headers)
    ctypes.memmove(at, headers, len(headers))
    assert libc.sendmmsg(udp.fileno(), ctypes.c_void_p(at), 1024, 0) == count
    udp2 = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    assert libc.sendto(udp2.fileno(), b"x", 1, 0, address(7200, 0), 16) == 1
    assert libc.connect(udp2.fileno(), ctypes.c_void_p(8), 16) == -1 and ctypes.get_errno() == 14
    """,
  )
  wanted = {(f"192.0.2.1:{7100 + i}", "send") for i in range(21)} | {("192.0.2.1:7200", "send")}
  assert set(direct(sandbox)) == wanted


def test_a_flood_is_bounded_and_counted(sandbox):
  python(
    sandbox,
    """
    import socket
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for port in range(8000, 8400):
      udp.sendto(b"x", ("192.0.2.1", port))
    for _ in range(5000):
      udp.sendto(b"x", ("192.0.2.1", 8000))
    """,
  )
  found = direct(sandbox)
  assert len(found) == 256 and found["192.0.2.1:8000", "send"] == 5001
  assert sandbox._link.log.lost == 144
  sandbox.run("echo > /dev/tcp/192.0.2.1/1")
  sandbox.reset()
  assert sandbox.attempts() == []


def test_labels_and_sessions(sandbox):
  """Each session has a listener of its own, and a label holds for what came before its change."""
  other = sandbox.session("other")
  sandbox.episode = "first"
  other.run("echo > /dev/tcp/192.0.2.1/1")
  sandbox.episode = "second"
  sandbox.run("echo > /dev/tcp/192.0.2.1/2")
  sandbox.verify("echo > /dev/tcp/192.0.2.1/3")
  other.close()
  labels = [(a.destination, a.episode) for a in sandbox.attempts()]
  sandbox.episode = ""
  assert labels == [
    ("192.0.2.1:1", "first"), ("192.0.2.1:2", "second"), ("192.0.2.1:3", "second"),
  ]  # fmt: skip
  deadline = time.monotonic() + 10  # the closed session's listener goes with its last process
  while sandbox.stats()["watching"] != 1 and time.monotonic() < deadline:
    time.sleep(0.05)
  assert sandbox.stats()["watching"] == 1


def test_callers_may_die_and_swarm(sandbox):
  """Processes killed in the very call, signals that interrupt it, threads, and many at once."""
  output = python(
    sandbox,
    """
    import os, random, signal, socket, threading, time
    def knock():
      udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
      while True: udp.sendmsg([b"x"], [], 0, ("192.0.2.1", 9000))
    children = []
    for _ in range(300):
      pid = os.fork()
      if pid == 0:
        knock()
      children.append(pid)
      if len(children) > 20:
        victim = children.pop(random.randrange(20))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
    for pid in children:
      os.kill(pid, signal.SIGKILL)
      os.waitpid(pid, 0)
    hits = 0
    def on_alarm(*_):
      global hits
      hits += 1
    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0005)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    def work():
      for _ in range(2000): udp.sendto(b"x", ("192.0.2.1", 9001))
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads: thread.start()
    work()
    for thread in threads: thread.join()
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(hits > 0)
    """,
    timeout=120,
  )
  assert output == "True\n"
  found = direct(sandbox)
  assert found["192.0.2.1:9000", "send"] > 100 and found["192.0.2.1:9001", "send"] == 10_000
  assert sandbox.run("echo next").output == "next\n"


def test_a_bomb_of_knocking_processes(isolated):
  isolated.run("b() { echo > /dev/tcp/127.77.9.9/1; b | b & }; b", timeout=1.0)
  isolated.attempts()
  assert isolated.verify("echo fine", timeout=20).output == "fine\n"
  isolated.reset()
  assert isolated.run("echo next").output == "next\n"


def test_many_local_sends_stay_cheap(sandbox):
  """send() on a connected socket is never looked at; sendmsg() is, and costs a few µs for it."""
  output = python(
    sandbox,
    """
    import socket, time
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    def lap(send):
      start = time.perf_counter()
      for _ in range(20000):
        send(); b.recv(10)
      return time.perf_counter() - start
    print(lap(lambda: a.send(b"x")), lap(lambda: a.sendmsg([b"x"])))
    """,
    timeout=120,
  )
  plain, looked_at = map(float, output.split())
  assert (
    plain < 5 and looked_at < 60
  )  # seconds on a crowded machine; some 0.03 and 0.3 on an idle one
