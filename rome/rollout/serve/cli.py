"""`rome serve`: the options of the server."""

import argparse
import hashlib
import importlib.util
import logging
import os
import sys
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from rome.envs.service.auth import Tokens

_NEEDED = ("fastapi", "prometheus_client", "uvicorn")
_LEAST_KEY = 8  # characters
_EPILOG = """\
The API is OpenAI's: /v1/chat/completions, /v1/completions, /v1/models; beside it /health, /ready,
/metrics and /openapi.json. Without a key only this machine can connect, and everybody on it may.
ROME_API_KEY holds one more key: unlike an option, it is not shown by ps."""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the subcommand.

  Args:
    argv: arguments without the program's name; sys.argv where None.
  Returns:
    0 after an orderly end, or 1 after one line on stderr that says what is wrong.
  """
  arguments = _parser().parse_args(argv)
  missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
  if missing:
    return _fail(f"needs {', '.join(missing)}: pip install 'rome[serve]'")
  from rome.rollout.serve import core, load, server

  logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
  try:
    tokens = _tokens(arguments.api_key or [], os.environ)
    listener = server.open_port(arguments.host, arguments.port, bool(tokens))
    with listener:
      served = load.prepare(
        load.LoadConfig(
          model=arguments.model,
          name=arguments.name,
          dtype=arguments.dtype,
          seed=arguments.seed,
          slots=arguments.slots,
          max_length=arguments.max_length,
          cache_tokens=arguments.cache_tokens,
          max_waiting=arguments.max_waiting,
          numerics=arguments.numerics,
          backend=arguments.backend,
        )
      )
      config = core.ServeConfig(
        host=arguments.host,
        port=arguments.port,
        deadline=arguments.deadline,
        drain=arguments.drain,
      )

      def announce(url: str) -> None:
        print(f"serving {served.name} on {url} (pid {os.getpid()})", flush=True)

      server.serve(core.Service(served, tokens, config), listener, announce)
  except (server.ServeError, OSError, ValueError) as error:
    return _fail(str(error))
  except KeyboardInterrupt:
    return _fail("interrupted before it was up")
  return 0


def _fail(message: str) -> int:
  print(f"rome serve: {message}", file=sys.stderr)
  return 1


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="rome serve", description="Serve a model over the OpenAI API.", epilog=_EPILOG
  )
  add = parser.add_argument
  add("--model", required=True, help="a Hugging Face directory, a .gguf file, or a preset's name")
  add("--name", help="what requests call the model (the last part of --model)")
  add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
  add("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
  add("--api_key", action="append", metavar="KEY", help="who may call; may be given several times")
  add("--slots", type=int, default=8, help="requests that run at once (%(default)s)")
  add(
    "--max_length",
    type=int,
    help="tokens of a prompt and its reply together (2048, or the model's limit if lower)",
  )
  add("--cache_tokens", type=int, help="tokens whose keys and values fit (2 x slots x max_length)")
  add("--max_waiting", type=int, default=1024, help="requests that may wait (%(default)s)")
  add("--dtype", default="float32", help="float32 or bfloat16 (%(default)s)")
  add("--numerics", default="fast", help="of the engine: fast or exact (%(default)s)")
  add("--backend", default="auto", help="of the engine: auto, native or xla (%(default)s)")
  add("--seed", type=int, default=0, help="of a preset's random weights (%(default)s)")
  add(
    "--deadline",
    type=_seconds,
    default=3600.0,
    metavar="SECONDS",
    help="that one request may take in all (%(default)s)",
  )
  add(
    "--drain",
    type=_seconds,
    default=30.0,
    metavar="SECONDS",
    help="for running requests to end after SIGTERM (%(default)s)",
  )
  return parser


def _seconds(text: str) -> float:
  value = float(text)
  if not 0 <= value < float("inf"):
    raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
  return value


def _tokens(keys: Sequence[str], environ: MutableMapping[str, str]) -> "Tokens":
  """The keys as tokens of clients named key1, key2, ...; the one in the environment is key0."""
  from rome.envs.service.auth import Tenant, Tokens
  from rome.rollout.serve.core import KEY_VARIABLE

  named = {f"key{i}": key for i, key in enumerate(keys, 1)}
  if KEY_VARIABLE in environ:
    named["key0"] = environ.pop(KEY_VARIABLE)
  for name, key in named.items():
    where = KEY_VARIABLE if name == "key0" else "--api_key"
    if len(key) < _LEAST_KEY:
      raise ValueError(f"a key in {where} is shorter than {_LEAST_KEY} characters: make it longer")
  if len(set(named.values())) < len(named):
    raise ValueError("the same key is given twice")
  return Tokens(
    [(hashlib.sha256(key.encode()).digest(), Tenant(name)) for name, key in named.items()]
  )


if __name__ == "__main__":
  sys.exit(main())
