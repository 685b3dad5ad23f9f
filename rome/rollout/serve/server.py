"""`rome serve` as a function: it listens, loads, serves, and ends in order.

The port is taken before anything is loaded, and while the model loads requests are answered with
503. SIGTERM or Ctrl-C: what runs has `drain` seconds to end, new requests are answered with 503
meanwhile, then the process ends with status 0. A second signal ends it at once.
"""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from rome.envs.service.sockets import Server, bounded, is_loopback, listen, url_of
from rome.rollout.serve.app import create_app
from rome.rollout.serve.core import KEY_VARIABLE, Service
from rome.rollout.serve.loop import EngineFailed

_KEEP_ALIVE = 30  # seconds a connection may idle between requests
_CONNECTIONS_PER_REQUEST = 2  # idle ones included
_LAST_BYTES = 5  # seconds that the ends of answers may take, after the drain


class ServeError(RuntimeError):
  """The server cannot start as asked; the message says what to change."""


def open_port(host: str, port: int, keys: bool) -> socket.socket:
  """Takes the port.

  Args:
    host, port: where; port 0 takes a free one.
    keys: whether callers need a key.
  Raises:
    ServeError: it is taken, or strangers could use the server.
  """
  if not keys and not is_loopback(host):
    raise ServeError(
      f"refusing to listen on {host} without a key: give --api_key or {KEY_VARIABLE}, or listen "
      "on 127.0.0.1"
    )
  try:
    return listen(host, port)
  except OSError as error:
    raise ServeError(str(error)) from error


def serve(service: Service, listener: socket.socket, announce: Callable[[str], None]) -> None:
  """Serves until SIGTERM or Ctrl-C.

  Args:
    service: what is served; its engine is loaded here.
    listener: the socket that listens.
    announce: is called with the URL once the model is there.

  Raises:
    ServeError: the model cannot be loaded.
  """
  config = service.config
  settings = uvicorn.Config(
    create_app(service),
    http=bounded(config.max_requests * _CONNECTIONS_PER_REQUEST),
    log_config=None,
    access_log=False,
    lifespan="off",
    timeout_keep_alive=_KEEP_ALIVE,
    timeout_graceful_shutdown=_LAST_BYTES,
    h11_max_incomplete_event_size=64 << 10,
    server_header=False,
    proxy_headers=False,
  )
  asyncio.run(_serve(service, settings, listener, announce))


async def _serve(
  service: Service,
  settings: uvicorn.Config,
  listener: socket.socket,
  announce: Callable[[str], None],
) -> None:
  loading = asyncio.ensure_future(service.loop.start())
  server = _Server(settings, service)

  def loaded(task: "asyncio.Future[None]") -> None:
    if not task.cancelled() and task.exception() is None:
      announce(url_of(listener))
    else:
      server.should_exit = True

  loading.add_done_callback(loaded)
  await server.serve([listener])
  ended = await service.close()
  try:
    with contextlib.suppress(EngineFailed):  # it was stopped while it was loading
      await loading
  except Exception as error:
    raise ServeError(f"{type(error).__name__}: {error}") from error
  if not ended:  # the engine is in the middle of something, and would be torn down under its feet
    os._exit(0)


class _Server(Server):
  """Drains at the first signal and ends at once at the second."""

  def __init__(self, config: uvicorn.Config, service: Service):
    super().__init__(config, lambda: None)
    self._service = service
    self._draining: asyncio.Future[None] | None = None

  def handle_exit(self, sig: int, frame: FrameType | None) -> None:
    if self._draining is None:
      self._draining = asyncio.ensure_future(self._drain())
      return
    signal.signal(sig, signal.SIG_DFL)
    os.kill(os.getpid(), sig)

  async def _drain(self) -> None:
    await self._service.drain()
    self.should_exit = True
