"""Attacks through sockets. Addresses are 127.0.0.0/8 only, whatever a sandbox may be made of."""

import secrets
import threading
import time

from experiments.isolation_attacks.attack import Attack, Scene, c, command, node, python

_KIND = "network"


def _loopback_of_neighbour(scene: Scene) -> None:
  """A neighbour listens on its loopback; nothing from here may arrive there."""
  port, token = 20000 + secrets.randbelow(20000), secrets.token_hex(8)
  session = scene.neighbour.session("listener")
  heard: list[str] = []

  def listen() -> None:
    heard.append(
      session.run(f"timeout 4 nc -l -p {port} 127.0.0.1 || timeout 2 nc -l -p {port}", 8).output
    )

  thread = threading.Thread(target=listen)
  thread.start()
  for _ in range(4):
    time.sleep(0.15)
    scene.run(
      f"for h in 127.0.0.1 127.0.0.2 localhost; do echo {token} | nc -w 1 $h {port} 2>&1; done"
    )
  thread.join(20)
  session.close()
  scene.expect(token not in "".join(heard), "a neighbour heard us on its loopback")


def _proxy(scene: Scene) -> None:
  """A policy that allows one name only: the proxy refuses all else, and says so."""
  scene.run(
    "for p in $http_proxy $https_proxy http://127.0.0.1:3128; do q=${p#http://}; q=${q%/}; "
    "printf 'CONNECT 127.0.0.1:{port} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n' | nc -w 1 ${q%:*} ${q##*:}; "
    "printf 'GET http://127.0.0.1:{port}/ HTTP/1.0\\r\\n\\r\\n' | nc -w 1 ${q%:*} ${q##*:}; done 2>&1"
  )


ATTACKS: list[Attack] = [
  c("the host's loopback, its unix and abstract sockets", _KIND,
    "reach {port} {abstract} {service} /run/podman/podman.sock /run/rome/sock /run/rome/boot", quick=True),
  c("every unix socket there is, asked in the server's language", _KIND, "knock", quick=True),
  c("socket families: vsock, packet, raw, alg", _KIND, "sockets", quick=True),
  c("devices, addresses and routes by netlink", _KIND, "route", quick=True),
  command("interfaces by tools", _KIND, "shell",
          "ip link add d type dummy; ip addr add 127.9.9.9/8 dev lo; ip route add default dev lo; "
          "ifconfig lo down; ip link set lo down; ip link show | head -n 4"),
  command("the host's port by every loopback address", _KIND, "shell",
          "for a in 127.0.0.1 127.0.0.2 127.1.1.1 localhost 0.0.0.0 ::1; do echo x | nc -w 1 $a {port}; done"),
  command("names by DNS, from loopback only", _KIND, "shell",
          "cat /etc/resolv.conf; nslookup -timeout=1 rome-canary.invalid 127.0.0.1; ping -c 1 -W 1 127.0.0.1", timeout=8),
  command("tunnel through a listener of one's own", _KIND, "shell",
          "(timeout 2 nc -l -p 2222 127.0.0.1 > got & sleep 0.3; echo tunnel | nc -w 1 127.0.0.1 2222; "
          "echo tunnel | nc -w 1 127.0.0.1 {port}); ssh -R 1:127.0.0.1:{port} 127.0.0.1 -o ConnectTimeout=1", timeout=6),
  Attack("a neighbour's loopback", _KIND, "shell", _loopback_of_neighbour, users=("agent",)),
  Attack("destinations that the proxy does not allow", _KIND, "shell", _proxy),
  command("scan of every port of the loopback", _KIND, "shell",
          "for p in 22 25 53 80 111 443 631 2375 2376 3128 5000 6443 8000 8080 8888 9090 10250 {port}; do "
          "(echo > /dev/tcp/127.0.0.1/$p) 2>/dev/null && echo \"open $p\"; done; echo scanned"),
  python("sockets of the host and of the server", _KIND,
         "import socket\nfor name in ('\\0{abstract}', '{service}', '/run/rome/sock', '/run/rome/boot'):\n"
         "  s = socket.socket(socket.AF_UNIX)\n  try:\n    s.connect(name); print('GOT', name)\n"
         "  except OSError as e: print(e)\n"
         "for f in (40, 17, 38):\n  try:\n    socket.socket(f, socket.SOCK_RAW); print('GOT family', f)\n"
         "  except OSError as e: print(e)\n"
         "try:\n  socket.create_connection(('127.0.0.1', {port}), 1); print('GOT port')\nexcept OSError as e: print(e)"),
  node("sockets of the host", _KIND,
       "const net = require('net');\nfor (const to of [{host: '127.0.0.1', port: {port}}, {path: '{service}'},"
       " {path: '\\0{abstract}'}, {path: '/run/rome/sock'}]) { const s = net.connect(to, () => { console.log('GOT'); process.exit(); });"
       " s.on('error', e => console.log(e.code)); }\nsetTimeout(() => process.exit(), 1000);"),
]  # fmt: skip
