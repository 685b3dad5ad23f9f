"""One key an episode, the calls made under it, and their way to the engine and back. No HTTP.

Three threads meet here. The event loop of the proxy reads calls and waits for replies; whoever runs
the engine takes what was asked (`Sessions.take`) and answers it; the thread of an episode watches
over its session. The event loop alone touches the record.

Idempotent: a body that was sent before under the same key is the same call, whether the first is
still under way, its connection was lost, or its answer was read long ago. It is sampled once, is
one chunk, and every sender gets the same reply. So a call goes on when its client hangs up: it may
come again, and the policy has said it either way. An agent that wants another sample of one context
has to say something else in the body, `seed` for one, which is not used otherwise.

`PolicySession` asks the run's engine; `rome.rollout.native.external` has the one that asks another
server.
"""

import asyncio
import collections
import concurrent.futures as cf
import contextlib
import dataclasses
import hashlib
import math
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from rome import models
from rome.envs.service.auth import Tenant, Tokens
from rome.rollout.crew import request_key
from rome.rollout.engine import Reply, Request
from rome.rollout.groups import Member
from rome.rollout.native.record import Call, Message, Record
from rome.rollout.recorder import Recorder
from rome.rollout.serve.errors import ApiError
from rome.text.render import Renderer

A = TypeVar("A")
ENDPOINT_FAILED = "endpoint_failed"  # the reason of an end
_KEY_PREFIX = "rome-"


class EpisodeEnded(RuntimeError):
  """The episode ended before a call of it was answered."""


@dataclasses.dataclass(frozen=True)
class Terms:
  """What every call of a run is sampled under.

  Attributes:
    renderer: of the policy's tokenizer.
    stop_tokens: ids that end a reply.
    sampling: the distribution that replies are drawn from.
    max_reply: tokens a reply may take.
    max_length: tokens a context and its reply may take.
    max_calls: calls an episode may make.
  """

  renderer: Renderer
  stop_tokens: tuple[int, ...]
  sampling: models.Sampling
  max_reply: int
  max_length: int
  max_calls: int


@dataclasses.dataclass(frozen=True)
class Answer:
  """A call that was answered, with all that its senders are told."""

  id: str
  created: int
  message: Message
  reply: Reply
  prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class Ask:
  """A call on its way to the engine.

  Attributes:
    session, call: whose it is.
    request: what the engine is asked.
    done: gets the reply, or why there is none; for any thread.
  """

  session: "PolicySession"
  call: Call
  request: Request
  done: "cf.Future[Reply]"


class Session:
  """The calls of one episode, whoever answers them.

  Attributes:
    id: names it, and is no secret.
    key: the bearer key; secret.
    member: keys the randomness of its replies.
    record: its calls.
    stopped: why the episode has to end, "" while it may go on.
    failure: what failed that is no doing of the agent's or of its model's, "" for nothing.
    overflowed: whether the last call was refused because its context is too long.
    dropped: whether nobody wants its calls any more; requests of it leave the engine.
  """

  def __init__(self, sessions: "Sessions", member: Member, terms: Terms, record: Recorder):
    self.id = f"episode-{secrets.token_hex(6)}"
    self.key = _KEY_PREFIX + secrets.token_urlsafe(32)
    self.member, self._terms, self._sessions = member, terms, sessions
    self.record = record
    self.stopped = self.failure = ""
    self.overflowed = self.dropped = False
    self._active = time.monotonic()
    self._open: set[cf.Future] = set()
    self._answers: dict[str, asyncio.Future] = {}  # by body; the event loop's

  # --- the event loop's ------------------------------------------------------------------------

  def _once(self, body: str, begin: Callable[[], Coroutine[Any, Any, A]]) -> "asyncio.Future[A]":
    """The answer to a call, as a future of the event loop that several may wait for.

    Args:
      body: what makes two calls the same.
      begin: begins a new call, and gives what waits for its answer.
    Raises:
      ApiError: 403 it is one call too many, or what `begin` raises.
    """
    self._active = time.monotonic()
    digest = hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()
    known = self._answers.get(digest)
    if known is not None and not (known.done() and (known.cancelled() or known.exception())):
      return known
    if self.record.calls >= self._terms.max_calls:
      self._end_with("max_turns", f"had its {self._terms.max_calls} calls")
    self._answers[digest] = found = asyncio.ensure_future(begin())
    found.add_done_callback(lambda f: f.cancelled() or f.exception())  # nobody may wait any more
    return found

  @contextlib.contextmanager
  def _waiting(self, done: cf.Future) -> Iterator[None]:
    """Around what takes the outcome of a call that `begin` has put into `_open`."""
    try:
      yield
    finally:
      self._active = time.monotonic()
      self._open.discard(done)

  def _end_with(self, reason: str, what: str) -> NoReturn:
    self.stop(reason)
    raise ApiError(403, f"the episode has {what}: it is over", code=reason)

  # --- for any thread --------------------------------------------------------------------------

  def stop(self, reason: str) -> None:
    """Says that the episode has to end; the first reason stays."""
    self.stopped = self.stopped or reason

  def listen(self) -> None:
    """Counts silence from now on: the agent has started."""
    self._active = time.monotonic()

  def silence(self) -> float:
    """Seconds without a call; 0 while one is under way."""
    return 0.0 if self._open else time.monotonic() - self._active

  def end(self) -> None:
    """Revokes the key. What is under way goes on. Idempotent."""
    self._sessions.forget(self)

  def drop(self) -> None:
    """Revokes the key, and says that nobody wants the calls that are under way. Idempotent."""
    self.end()
    self.dropped = True

  def settle(self, timeout: float) -> bool:
    """Waits until all calls are answered; whether they are."""
    end = time.monotonic() + timeout
    while self._open and time.monotonic() < end:
      time.sleep(0.005)
    return not self._open


class PolicySession(Session):
  """Calls that the policy answers."""

  record: Record

  def __init__(self, sessions: "Sessions", member: Member, terms: Terms):
    super().__init__(sessions, member, terms, Record(terms.renderer, terms.stop_tokens))

  def ask(
    self, body: str, messages: Sequence[Message], tools: Sequence[Message]
  ) -> "asyncio.Future[Answer]":
    """The answer to a call, as a future of the event loop that several may wait for.

    Args:
      body: what makes two calls the same.
      messages, tools: as for `Record.read`.
    Raises:
      ApiError: 400 the messages cannot be rendered or are too long, 403 it is one call too many.
    """
    return self._once(body, lambda: self._begin(messages, tools))

  def _begin(
    self, messages: Sequence[Message], tools: Sequence[Message]
  ) -> Coroutine[Any, Any, Answer]:
    # Texts that are too long whatever their tokens are.
    size = sum(len(message["content"]) for message in messages)
    if size > self._terms.max_length * self._sessions.longest:
      self._overflow(f"{size} characters")
    call = self._read(messages, tools)
    self.record.begin(call)
    request = Request(
      context=tuple(call.context),
      max_tokens=self._terms.max_reply,
      sampling=self._terms.sampling,
      key=request_key(self.member, call.number),
    )
    ask = Ask(self, call, request, cf.Future())
    self._open.add(ask.done)
    self._sessions.put(ask)
    return self._answer(ask)

  def _overflow(self, size: str) -> NoReturn:
    self.overflowed = True
    terms = self._terms
    raise ApiError(
      400,
      f"{size} of the messages and {terms.max_reply} tokens of the reply are more than the "
      f"{terms.max_length} tokens that they may be together",
      param="messages",
      code="context_length_exceeded",
    )

  def _read(self, messages: Sequence[Message], tools: Sequence[Message]) -> Call:
    """The call, if it can be made."""
    terms = self._terms
    try:
      call = self.record.read(messages, tools)
    except (RecursionError, ValueError) as error:
      raise ApiError(400, f"messages: {error}", param="messages", code="chat_template") from None
    if len(call.context) + terms.max_reply > terms.max_length:
      self._overflow(f"{len(call.context)} tokens")
    if self.record.rows + call.begins_row > self._sessions.max_rows:
      self._end_with("max_rows", f"rewritten its context into {self.record.rows} rows")
    self.overflowed = False
    return call

  async def _answer(self, ask: Ask) -> Answer:
    with self._waiting(ask.done):
      reply = await asyncio.wrap_future(ask.done)
      message = self.record.answer(ask.call, reply)
    return Answer(
      f"chatcmpl-{self.id}-{ask.call.number}",
      int(time.time()),
      message,
      reply,
      len(ask.call.context),
    )


class Sessions(Tokens):
  """The sessions of a run by their keys, and the asks that wait for the engine.

  Args:
    terms: of every call.
    kind: makes a session of these sessions, a member and the terms.
  Attributes:
    terms: as given.
    longest: bytes of the longest token.
    max_rows: rows that an episode may have.
    ring: is called when something was asked; from the event loop.
  """

  def __init__(self, terms: Terms, kind: Callable[..., Session] = PolicySession):
    super().__init__()
    self.terms, self._kind = terms, kind
    tokenizer = terms.renderer.tokenizer
    self.longest = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
    self.max_rows = math.inf
    self.ring: Callable[[], None] = lambda: None
    self._lock = threading.Lock()
    self._by_key: dict[bytes, Session] = {}
    self._by_id: dict[str, Session] = {}
    self._asks: collections.deque[Ask] = collections.deque()

  def __bool__(self) -> bool:
    return True  # nobody calls without a key, also where there is none yet

  def open(self, member: Member) -> Session:
    """A session of an episode, with a key of its own."""
    session = self._kind(self, member, self.terms)
    with self._lock:
      self._by_key[_digest(session.key)] = session
      self._by_id[session.id] = session
    return session

  def forget(self, session: Session) -> None:
    """Revokes a session's key."""
    with self._lock:
      self._by_key.pop(_digest(session.key), None)
      self._by_id.pop(session.id, None)

  def of(self, id: str) -> Session:
    """The session of that id. Raises ApiError where it has just ended."""
    with self._lock:
      session = self._by_id.get(id)
    if session is None:
      raise ApiError(401, "the episode of this key has ended", code="invalid_api_key")
    return session

  def tenant(self, authorization: str | None, *, basic: bool = False) -> Tenant | None:
    scheme, _, token = (authorization or "").strip().partition(" ")
    if scheme.lower() != "bearer":
      return None
    with self._lock:
      session = self._by_key.get(_digest(token.strip()))
    return Tenant(session.id) if session else None

  def put(self, ask: Ask) -> None:
    """Puts a call in line for the engine."""
    with self._lock:
      self._asks.append(ask)
    self.ring()

  def take(self) -> list[Ask]:
    """All that was asked since the last time."""
    with self._lock:
      asks, self._asks = list(self._asks), collections.deque()
    return asks


def _digest(key: str) -> bytes:
  return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
