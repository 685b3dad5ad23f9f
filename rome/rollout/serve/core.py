"""The server without its HTTP: settings, the model it serves, and who waits for it."""

import asyncio
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from rome.envs.service.auth import Tokens
from rome.envs.service.limits import Rates
from rome.rollout.engine import Engine, QueueFull, Request, Update
from rome.rollout.serve.errors import ApiError
from rome.rollout.serve.loop import EngineFailed, EngineLoop, Ticket
from rome.rollout.serve.metrics import ServeMetrics
from rome.rollout.serve.vocabulary import Vocabulary
from rome.text import Tokenizer

KEY_VARIABLE = "ROME_API_KEY"
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class ServeConfig:
  """How the server runs.

  Attributes:
    host, port: where it listens; port 0 takes a free one.
    deadline: seconds that one request may take in all.
    drain: seconds that running requests have to end after SIGTERM.
    max_requests: HTTP requests at a time, those that wait too.
    max_body: bytes of a request's body.
    slow: seconds that one piece of a body or of an answer may take.
  """

  host: str = "127.0.0.1"
  port: int = 8000
  deadline: float = 3600.0
  drain: float = 30.0
  max_requests: int = 4096
  max_body: int = 8 << 20
  slow: float = 60.0


@dataclasses.dataclass(frozen=True)
class Served:
  """The model that is served.

  Attributes:
    name: what requests call it.
    tokenizer: its tokenizer.
    vocab_size: rows of the model.
    max_length: tokens of a prompt and its reply together.
    stop_tokens: ids that end a reply.
    make: makes the engine, with the weights in it; takes seconds to minutes.
  """

  name: str
  tokenizer: Tokenizer
  vocab_size: int
  max_length: int
  stop_tokens: tuple[int, ...]
  make: Callable[[], Engine]


class Service:
  """What the routes share."""

  def __init__(self, served: Served, tokens: Tokens, config: ServeConfig):
    self.served, self.tokens, self.config = served, tokens, config
    self.loop = EngineLoop(served.make, self._observe)
    self.metrics = ServeMetrics(lambda: self.loop.stats)
    self.rates = Rates()
    self.vocabulary = Vocabulary(served.tokenizer, served.vocab_size)
    self.created = int(time.time())
    self.draining = False
    self._threads = concurrent.futures.ThreadPoolExecutor(2, "text")

  def _observe(self, ticket: Ticket, index: int, update: Update) -> None:
    self.metrics.update(time.monotonic(), ticket, index, update)

  async def think(self, work: Callable[[], _T]) -> _T:
    """Runs templates and tokenizers in a thread: long prompts take long."""
    return await asyncio.get_running_loop().run_in_executor(self._threads, work)

  def check_ready(self) -> None:
    """Raises ApiError where no request can be taken."""
    if self.draining:
      raise ApiError(503, "the server is being stopped", code="draining", retry_after=5)
    if self.loop.state == "loading":
      raise ApiError(503, "the model is being loaded", code="loading", retry_after=5)
    if self.loop.state != "ready":
      raise ApiError(500, f"the engine has {self.loop.state}", code="engine_failed")

  async def submit(self, requests: Sequence[Request]) -> Ticket:
    """Hands requests to the engine.

    Raises:
      ApiError: 400 they can never be served, 429 too many wait, 500 the engine has failed.
    """
    try:
      return await self.loop.submit(requests)
    except ValueError as error:
      raise ApiError(400, str(error)) from None
    except QueueFull as error:
      raise ApiError(429, str(error), code="queue_full", retry_after=1) from None
    except EngineFailed as error:
      raise engine_failed(error) from None

  async def drain(self) -> None:
    """Refuses new requests, and waits for those under way, then ends them."""
    self.draining = True
    end = time.monotonic() + self.config.drain
    while self.loop.open and time.monotonic() < end:
      await asyncio.sleep(0.02)
    late = ApiError(503, "the server is being stopped", code="draining", retry_after=5)
    self.loop.cancel_all(late)

  async def close(self) -> bool:
    """Ends the engine's thread; whether it has ended."""
    self.draining = True
    self._threads.shutdown(wait=False, cancel_futures=True)
    return await self.loop.close()


def engine_failed(error: EngineFailed) -> ApiError:
  """The answer where there is no engine any more."""
  return ApiError(500, str(error), code="engine_failed")
