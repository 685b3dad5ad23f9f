"""The engine's thread, and how the event loop talks to it.

One thread makes the engine and alone touches it. The event loop hands it commands (submit, cancel,
publish) through a list under a condition; between two steps the thread carries them out, and it
sleeps on the condition where there is nothing to do. What a step brings goes back in one call to
the event loop, however many replies it adds to.

If the engine raises, it is not used again: every request under way ends with `EngineFailed`, and so
does every later one. Weights can be published while requests run; those go on under their own.
Choice: a request under way is never begun anew under newer weights (`Engine.publish(interrupt)`),
as what was streamed cannot be taken back.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rome.rollout.engine import Engine, QueueFull, Request, Stats, Update

_log = logging.getLogger("rome.rollout.serve")
_T = TypeVar("_T")


class EngineFailed(RuntimeError):
  """The engine has raised an error, or was closed, and serves nothing any more."""


class Ticket:
  """The replies to one HTTP request, as they come. Lives on the event loop.

  Attributes:
    started: when it was submitted, in seconds of `time.monotonic`.
    last: when each reply's latest tokens came; None before the first.
  """

  def __init__(self, count: int):
    self.started = time.monotonic()
    self.last: list[float | None] = [None] * count
    self._open = count
    self._news: list[tuple[int, Update]] = []
    self._error: Exception | None = None
    self._awake = asyncio.Event()

  @property
  def done(self) -> bool:
    """Whether all replies have ended, or none will."""
    return self._open == 0 or self._error is not None

  def add(self, index: int, update: Update) -> None:
    """Takes one update of one reply."""
    self._news.append((index, update))
    self._open -= update.reply is not None
    self._awake.set()

  def fail(self, error: Exception) -> None:
    """No more updates come."""
    self._error = error
    self._awake.set()

  async def news(self) -> list[tuple[int, Update]]:
    """All updates since the last call with the indices of their requests; waits for at least one.

    A reader that comes late gets more at once. [] where all replies have ended.

    Raises:
      EngineFailed: they never will.
    """
    while not self._news:
      if self._error:
        raise self._error
      if not self._open:
        return []
      self._awake.clear()
      await self._awake.wait()
    news, self._news = self._news, []
    return news


class EngineLoop:
  """Runs an engine in a thread of its own. Every method is called on the event loop.

  Args:
    make: makes the engine, with weights published; called in the thread.
    observe: is called with every update before its reader gets it.
  Attributes:
    state: "loading", "ready", "failed" or "closed".
    failure: what made it fail.
    stats: the engine's, as of its latest step.
  """

  def __init__(
    self,
    make: Callable[[], Engine],
    observe: Callable[[Ticket, int, Update], None] = lambda ticket, index, update: None,
  ):
    self._make, self._observe = make, observe
    self.state = "loading"
    self.failure: Exception | None = None
    self.stats = Stats()
    self._wake = threading.Condition()
    self._commands: list[Callable[[Engine], None]] = []
    self._closing = False
    self._entries: dict[int, tuple[Ticket, int]] = {}  # the thread's: by the engine's id
    # The event loop's: what is under way.
    self._tickets: set[Ticket] = set()
    self._calls: set[asyncio.Future[Any]] = set()
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  # --- on the event loop -----------------------------------------------------------------------

  async def start(self) -> None:
    """Starts the thread and waits until the engine is there.

    Raises:
      Exception: what `make` raised.
      EngineFailed: it was closed meanwhile.
    """
    self._loop = asyncio.get_running_loop()
    self._loaded: asyncio.Future[None] = self._loop.create_future()
    self._calls.add(self._loaded)
    self._thread.start()
    await self._loaded

  @property
  def open(self) -> int:
    """HTTP requests whose replies are under way."""
    return len(self._tickets)

  async def submit(self, requests: Sequence[Request]) -> Ticket:
    """Puts requests in line, all or none.

    Raises:
      ValueError: one of them can never be served; the message says why.
      QueueFull: too many requests wait.
      EngineFailed: there is no engine (any more).
    """
    ticket = Ticket(len(requests))

    def enter(engine: Engine) -> None:
      ids: list[int] = []
      try:
        for request in requests:
          ids.append(engine.submit(request))
      except (ValueError, QueueFull):
        for id in ids:
          engine.cancel(id)
        raise
      self._entries |= {id: (ticket, index) for index, id in enumerate(ids)}

    self._tickets.add(ticket)
    try:
      await self.call(enter)
    except BaseException:
      self.cancel(ticket)
      raise
    return ticket

  def cancel(self, ticket: Ticket, error: Exception | None = None) -> None:
    """Ends what a ticket waits for, with an error for who reads it; its slots are free at once."""
    self._tickets.discard(ticket)
    if ticket.done:
      return
    ticket.fail(error or EngineFailed("the request was cancelled"))

    def leave(engine: Engine) -> None:
      for id in [id for id, (other, _) in self._entries.items() if other is ticket]:
        del self._entries[id]
        engine.cancel(id)

    self._send(leave)

  def cancel_all(self, error: Exception) -> None:
    """Ends every request under way with an error."""
    for ticket in list(self._tickets):
      self.cancel(ticket, error)

  async def publish(self, params: Any, version: int, key: Any = None) -> None:
    """Takes new weights for the requests that start from now on; see `Engine.publish`.

    Raises:
      ValueError: the version is not above the last one.
      EngineFailed: there is no engine (any more).
    """
    await self.call(lambda engine: engine.publish(params, version, key))

  async def call(self, work: Callable[[Engine], _T]) -> _T:
    """Runs `work` in the engine's thread between two steps and returns what it returns.

    Raises:
      EngineFailed: there is no engine (any more).
      Exception: what `work` raised.
    """
    if self.state != "ready":
      raise EngineFailed(f"the engine is {self.state}")
    future: asyncio.Future[_T] = self._loop.create_future()
    self._calls.add(future)

    def command(engine: Engine) -> None:
      try:
        result = work(engine)
      except Exception as error:
        self._post(self._settle, future, None, error)
      else:
        self._post(self._settle, future, result, None)

    self._send(command)
    return await future

  async def close(self, timeout: float = 5.0) -> bool:
    """Ends the thread after the step it is in, within `timeout` seconds; whether it has ended."""
    with self._wake:
      self._closing = True
      self._wake.notify()
    self._end("closed", None)
    end = time.monotonic() + timeout
    while self._thread.is_alive() and time.monotonic() < end:
      await asyncio.sleep(0.01)
    return not self._thread.is_alive()

  def _send(self, command: Callable[[Engine], None]) -> None:
    with self._wake:
      self._commands.append(command)
      self._wake.notify()

  def _settle(self, future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    self._calls.discard(future)
    if future.done():  # cancelled: nobody waits any more
      return
    if error is not None:
      future.set_exception(error)
    else:
      future.set_result(result)

  def _deliver(self, stats: Stats, updates: Sequence[tuple[Ticket, int, Update]]) -> None:
    self.stats = stats
    for ticket, index, update in updates:
      self._observe(ticket, index, update)
      ticket.add(index, update)
      if ticket.done:
        self._tickets.discard(ticket)

  def _begin(self, stats: Stats) -> None:
    if self.state == "loading":
      self.state, self.stats = "ready", stats
      self._settle(self._loaded, None, None)

  def _end(self, state: str, cause: Exception | None) -> None:
    """Nothing is served any more: everybody who waits is told."""
    if self.state in ("failed", "closed"):
      return
    loading, self.state, self.failure = self.state == "loading", state, cause
    reason = f": {type(cause).__name__}: {cause}" if cause else ""
    error = EngineFailed(f"the engine has {state}{reason}" if cause else "the engine was closed")
    for future in list(self._calls):
      self._settle(future, None, cause if loading and cause else error)
    for ticket in list(self._tickets):
      self._tickets.discard(ticket)
      ticket.fail(error)

  # --- in the thread ---------------------------------------------------------------------------

  def _post(self, function: Callable[..., None], *arguments: Any) -> None:
    try:
      self._loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # the event loop has ended, and with it everybody who waited
      self._closing = True

  def _run(self) -> None:
    try:
      engine = self._make()
      self._post(self._begin, engine.stats)
      while self._round(engine):
        pass
    except Exception as error:
      if self.state != "loading":
        _log.exception("the engine has failed")
      self._post(self._end, "failed", error)

  def _round(self, engine: Engine) -> bool:
    """Carries out commands and takes a step; False at the end."""
    with self._wake:
      while not (self._commands or self._closing or engine.busy):
        self._wake.wait()
      commands, self._commands = self._commands, []
      if self._closing:
        return False
    for command in commands:
      command(engine)
    found = []
    for update in engine.step() if engine.busy else ():
      entry = self._entries.get(update.id)
      if entry is not None:  # else it was cancelled
        found.append((*entry, update))
        if update.reply is not None:
          del self._entries[update.id]
    self._post(self._deliver, engine.stats, found)
    return True
