"""`rome sandbox serve` as a function: uvicorn with bounds on connections, and an orderly end.

SIGTERM and Ctrl-C: it listens no more, running requests have `drain` seconds to end, then every
sandbox is closed and the process ends with status 0. A second Ctrl-C does not wait for requests.
"""

import asyncio
from collections.abc import Callable

import uvicorn

from rome.envs.common import SandboxError
from rome.envs.manager import Manager
from rome.envs.service.app import create_app
from rome.envs.service.auth import TOKEN_VARIABLE, Tokens
from rome.envs.service.core import ServiceConfig
from rome.envs.service.sockets import Server, bounded, is_loopback, listen, url_of

_KEEP_ALIVE = 30  # seconds a connection may idle between requests
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
    try:
      listener = listen(config.host, config.port)
    except OSError as error:
      raise ServeError(str(error)) from error
    with listener:
      settings = uvicorn.Config(
        app,
        http=bounded(config.max_requests * _CONNECTIONS_PER_REQUEST),
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
      url = url_of(listener, "https" if config.certfile else "http")
      asyncio.run(Server(settings, lambda: announce(url)).serve([listener]))
  finally:
    manager.close()
