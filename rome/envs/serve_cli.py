"""`rome sandbox serve`: the options of the service."""

import argparse
import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rome.envs.common import BackendUnavailable, SandboxError, SandboxSpec

if TYPE_CHECKING:
  from rome.envs.manager import Manager

_NEEDED = ("fastapi", "httpx", "prometheus_client", "uvicorn")
_EPILOG = """\
Tokens: a TOML file with a table a tenant, of sha256 = the hash of its token (printf %s "$TOKEN" |
sha256sum) and any quotas (sandboxes, cpus, memory_mb, calls, requests_per_second,
upload_bytes_per_second); or ROME_SANDBOX_TOKEN, one token for one tenant. Without either, only
this machine can connect, and everybody on it may."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
  """Adds `serve` to the commands of `rome sandbox`."""
  serve = commands.add_parser(
    "serve", help="serve sandboxes and environments over HTTP", epilog=_EPILOG
  )
  serve.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
  serve.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
  serve.add_argument("--tokens", metavar="FILE", help="who may call; see below")
  serve.add_argument("--certfile", metavar="FILE", help="TLS certificate chain, PEM")
  serve.add_argument("--keyfile", metavar="FILE", help="its private key, PEM")
  serve.add_argument(
    "--sandbox", default="auto", choices=["auto", "podman", "bubblewrap"], help="(%(default)s)"
  )
  serve.add_argument(
    "--warm", type=int, default=0, metavar="N", help="default sandboxes to keep ready (%(default)s)"
  )
  serve.add_argument(
    "--ray",
    metavar="ADDRESS",
    help="spread the sandboxes over the hosts of a Ray cluster; 'auto': the one that runs here",
  )
  serve.add_argument(
    "--drain",
    type=float,
    default=30.0,
    metavar="SECONDS",
    help="for running requests to end after SIGTERM (%(default)s)",
  )
  serve.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
  missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
  if missing:
    raise BackendUnavailable(
      f"the service needs {', '.join(missing)}: install the extra with pip install 'rome[fleet]'"
    )
  from rome.envs.service import auth, core, server

  logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
  tokens = auth.load_tokens(arguments.tokens)
  config = core.ServiceConfig(
    host=arguments.host,
    port=arguments.port,
    certfile=arguments.certfile,
    keyfile=arguments.keyfile,
    backend=arguments.sandbox,
    drain=arguments.drain,
  )
  server.check(config, tokens)
  warm = {SandboxSpec(backend=arguments.sandbox): arguments.warm} if arguments.warm else {}
  with _manager(arguments.ray, warm) as manager:
    server.serve(manager, tokens, config, _announce)
  return 0


@contextlib.contextmanager
def _manager(ray_address: str | None, warm: Mapping[SandboxSpec, int]) -> "Iterator[Manager]":
  """The manager of this machine's sandboxes, or of a whole fleet's."""
  if ray_address is None:
    from rome.envs.manager import Manager

    yield Manager(warm=warm)
    return
  from rome.envs.fleet import Fleet
  from rome.envs.fleet_link import import_ray

  ray = import_ray()
  try:
    ray.init(ray_address, log_to_driver=False)
  except (ConnectionError, RuntimeError, ValueError) as error:
    raise SandboxError(
      f"cannot connect to Ray at {ray_address}: {error}; start it there with `ray start`"
    ) from error
  try:
    yield Fleet(warm=warm)
  finally:
    ray.shutdown()


def _announce(url: str) -> None:
  """One line on standard output, for those who wait for it; pid included, to be stopped by."""
  print(f"serving on {url} (pid {os.getpid()})", flush=True)
  if not sys.stdout.isatty():
    logging.getLogger("rome.envs.service").info("serving on %s", url)
