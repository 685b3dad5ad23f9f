"""`rome sandbox serve` as a function: uvicorn with bounds on connections, and an orderly end.

SIGTERM and Ctrl-C: it listens no more, running requests have `drain` seconds to end, then every
sandbox is closed and the process ends with status 0. A second Ctrl-C does not wait for requests.
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

from rome.envs.common import SandboxError
from rome.envs.manager import Manager
from rome.envs.service.app import create_app
from rome.envs.service.auth import TOKEN_VARIABLE, Tokens
from rome.envs.service.core import ServiceConfig

_BACKLOG = 1024
_KEEP_ALIVE = 30  # seconds a connection may idle between requests
_HEADERS_IN = 15.0  # seconds that a request's headers may take
_CONNECTIONS_PER_REQUEST = 2  # idle ones included


class ServeError(SandboxError):
  """The service cannot start as asked; the message says what to change."""


def check(config: ServiceConfig, tokens: Tokens) -> None:
  """Raises ServeError where strangers could use the service, or TLS is half configured."""
  if bool(config.certfile) != bool(config.keyfile):
    raise ServeError("TLS needs both --certfile and --keyfile")
  if not tokens and not is_loopback(config.host):
    raise ServeError(
      f"refusing to listen on {config.host} without a token: give --tokens FILE or "
      f"{TOKEN_VARIABLE}, or listen on 127.0.0.1"
    )


def is_loopback(host: str) -> bool:
  """Whether only this machine can reach the address."""
  if host == "localhost":
    return True
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def serve(
  manager: Manager,
  tokens: Tokens,
  config: ServiceConfig,
  announce: Callable[[str], None] = lambda url: None,
) -> None:
  """Serves until SIGTERM or Ctrl-C. The manager is closed at the end, however it comes.

  Args:
    manager: whose sandboxes are served.
    tokens: who may call.
    config: how.
    announce: is called with the URL once connections are accepted.

  Raises:
    ServeError: it cannot start as asked.
  """
  try:
    check(config, tokens)
    app = create_app(manager, tokens, config)
    with _listen(config) as listener:
      settings = uvicorn.Config(
        app,
        http=_bounded(config.max_requests * _CONNECTIONS_PER_REQUEST),
        log_config=None,
        access_log=False,
        lifespan="on",
        ssl_certfile=config.certfile,
        ssl_keyfile=config.keyfile,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(config.drain)),
        h11_max_incomplete_event_size=64 << 10,
        server_header=False,
        proxy_headers=False,
      )
      try:
        settings.load()
      except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ServeError(f"TLS certificate {config.certfile}: {error}") from error
      host, port = listener.getsockname()[:2]
      url = f"{'https' if config.certfile else 'http'}://"
      url += f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
      asyncio.run(_Server(settings, lambda: announce(url)).serve([listener]))
  finally:
    manager.close()


def _listen(config: ServiceConfig) -> socket.socket:
  try:
    family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((config.host, config.port))
    listener.listen(_BACKLOG)
  except (OSError, OverflowError) as error:
    raise ServeError(f"cannot listen on {config.host} port {config.port}: {error}") from error
  return listener


class _Server(uvicorn.Server):
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


def _bounded(most: int) -> type[H11Protocol]:
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
        self._timer = self.loop.call_later(_HEADERS_IN, self.transport.abort)

    def _unwatch(self) -> None:
      if self._timer is not None:
        self._timer.cancel()
        self._timer = None

  return Bounded
