"""A relay on the way to a server that keeps the bodies of requests, byte by byte."""

import contextlib
import re
import socket
import threading
from collections.abc import Iterator

_LENGTH = re.compile(rb"^content-length:\s*(\d+)", re.IGNORECASE | re.MULTILINE)


class Relay:
  """Passes bytes on as they come, both ways.

  Args:
    url: of the server, such as http://127.0.0.1:8000/v1.
  Attributes:
    url: the same API, by way of the relay.
    bodies: of the requests so far, in the order in which they were complete.
  """

  def __init__(self, url: str):
    host, port, path = re.fullmatch(r"http://([^:/]+):(\d+)(/.*)", url).groups()
    self._server = host, int(port)
    self._listener = socket.create_server(("127.0.0.1", 0))
    self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}{path}"
    self.bodies: list[bytes] = []
    threading.Thread(target=self._run, daemon=True).start()

  def _run(self) -> None:
    with contextlib.suppress(OSError):  # it was closed
      while True:
        client, _ = self._listener.accept()
        server = socket.create_connection(self._server)
        for what in (self._there, self._back):
          threading.Thread(target=what, args=(client, server), daemon=True).start()

  def _there(self, client: socket.socket, server: socket.socket) -> None:
    data = b""
    with server, contextlib.suppress(OSError):
      while part := client.recv(65536):
        data = self._keep(data + part)
        server.sendall(part)
      server.shutdown(socket.SHUT_RDWR)

  def _back(self, client: socket.socket, server: socket.socket) -> None:
    with client, contextlib.suppress(OSError):
      while part := server.recv(65536):
        client.sendall(part)
      client.shutdown(socket.SHUT_RDWR)

  def _keep(self, data: bytes) -> bytes:
    """Takes the bodies of whole requests; returns what is left."""
    while b"\r\n\r\n" in data:
      head, _, rest = data.partition(b"\r\n\r\n")
      length = int(found[1]) if (found := _LENGTH.search(head)) else 0
      if len(rest) < length:
        break
      self.bodies.append(rest[:length])
      data = rest[length:]
    return data

  def close(self) -> None:
    self._listener.close()


@contextlib.contextmanager
def relayed(url: str) -> Iterator[Relay]:
  relay = Relay(url)
  try:
    yield relay
  finally:
    relay.close()
