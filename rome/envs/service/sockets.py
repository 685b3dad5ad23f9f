"""What a service of this project listens with: a socket, uvicorn with bounds, an orderly end.

Used by the sandbox service and by `rome serve`.
"""

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

BACKLOG = 1024
HEADERS_IN = 15.0  # seconds that a request's headers may take


def is_loopback(host: str) -> bool:
  """Whether only this machine can reach the address."""
  if host == "localhost":
    return True
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def listen(host: str, port: int) -> socket.socket:
  """A socket that listens; port 0 takes a free one.

  Raises:
    OSError: it cannot; the message names host, port and reason.
  """
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(BACKLOG)
  except (OSError, OverflowError) as error:
    raise OSError(f"cannot listen on {host} port {port}: {error}") from error
  return listener


def url_of(listener: socket.socket, scheme: str = "http") -> str:
  """The URL under which a listening socket is reached."""
  host, port = listener.getsockname()[:2]
  return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class Server(uvicorn.Server):
  """Says when it listens, tells the app when it drains, and ends with status 0 on SIGTERM."""

  def __init__(self, config: uvicorn.Config, started: Callable[[], None]):
    super().__init__(config)
    self._announce = started

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    await super().startup(sockets)
    if not self.should_exit:
      self._announce()

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    """uvicorn's own raises the signal again at the end, which would skip the exit handlers."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
      loop.add_signal_handler(number, self.handle_exit, number, None)
    try:
      yield
    finally:
      for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)


def bounded(most: int) -> type[H11Protocol]:
  """uvicorn's protocol with a bound on connections and a deadline for a request's headers."""

  class Bounded(H11Protocol):
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
      super().connection_made(transport)
      if len(self.connections) > most:
        logging.getLogger("rome.envs.service").warning("more than %d connections", most)
        transport.abort()
        return
      self._watch()

    def data_received(self, data: bytes) -> None:
      super().data_received(data)
      self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
      self._unwatch()
      super().connection_lost(exc)

    def _watch(self) -> None:
      """Runs the clock while a request's headers have begun to come, and before the first."""
      if self.conn.their_state is not h11.IDLE:
        self._unwatch()
      elif self._timer is None:
        self._timer = self.loop.call_later(HEADERS_IN, self.transport.abort)

    def _unwatch(self) -> None:
      if self._timer is not None:
        self._timer.cancel()
        self._timer = None

  return Bounded
