"""The environments' side of a rollout: threads, deadlines, closing, back-off.

An environment may hang, so its calls run in daemon threads that can be left behind, which those of
an executor cannot: it joins them at exit. A call that is silent beyond its deadline is given up;
its sandbox is killed, which ends most of what a thread can hang in, and then the environment is
closed. What does not come back even then is counted, and too many of them end the run.
"""

import concurrent.futures as cf
import contextlib
import dataclasses
import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from rome.agent import Agent
from rome.agent.world import SandboxConfig
from rome.envs.sandbox import SandboxError
from rome.rollout.groups import Member
from rome.rollout.recorder import Episode, Recorder
from rome.rollout.starts import Start

_SETTINGS = {"reset": "sandbox.reset_deadline", "step": "sandbox.deadline"}


class TooManyAbandoned(RuntimeError):
  """More threads than allowed hang in environments whose sandboxes were killed."""


@dataclasses.dataclass(frozen=True)
class Patience:
  """How long environments are waited for; seconds.

  Attributes:
    reset: for an episode to begin, the wait for a free sandbox included.
    step: for one action, the tests of the last one included.
    close: for an environment to close.
    grace: what a cancelled call may take before its sandbox is killed. Choice: a second, in which
      most commands end, so that the sandbox can serve again.
    tries: resets an episode may take before it is invalid.
    first_delay: wait before the second reset; it doubles with each further one.
    longest_delay: it does not grow beyond this.
    max_abandoned: threads that may hang at once.
  """

  reset: float = 120.0
  step: float = 120.0
  close: float = 30.0
  grace: float = 1.0
  tries: int = 5
  first_delay: float = 0.5
  longest_delay: float = 30.0
  max_abandoned: int = 16

  @classmethod
  def of(cls, config: SandboxConfig) -> "Patience":
    """As the settings of sandboxes say."""
    return cls(
      reset=config.reset_deadline,
      step=config.deadline,
      close=config.close_deadline,
      tries=config.reset_tries,
      max_abandoned=config.max_abandoned,
    )

  def delay(self, member: Member, failures: int) -> float:
    """Wait after the `failures`-th failed reset in a row: exponential, capped, spread over its
    upper half by a jitter that is the same for the same member and failure."""
    longest = min(self.first_delay * 2.0 ** min(failures - 1, 60), self.longest_delay)
    jitter = random.Random(f"{member.instance} {member.sample} {failures}").random()
    return longest * (1 + jitter) / 2


class Threads:
  """Daemon threads, started as they are needed and used again."""

  def __init__(self) -> None:
    self._idle: list[queue.SimpleQueue] = []
    self._lock = threading.Lock()
    self._closed = False

  def submit(self, work: Callable[..., Any], *args: Any) -> cf.Future:
    """Runs `work(*args)` at once; nothing waits for another's thread."""
    future: cf.Future = cf.Future()
    with self._lock:
      jobs = self._idle.pop() if self._idle else None
    if jobs is None:
      jobs = queue.SimpleQueue()
      threading.Thread(target=self._serve, args=(jobs,), name="env", daemon=True).start()
    jobs.put((future, work, args))
    return future

  def close(self) -> None:
    """Ends idle threads, and the others when their work returns."""
    with self._lock:
      self._closed = True
      for jobs in self._idle:
        jobs.put(None)
      self._idle.clear()

  def _serve(self, jobs: queue.SimpleQueue) -> None:
    while (job := jobs.get()) is not None:
      _run(*job)
      del job  # What an idle thread holds on to would live on.
      with self._lock:
        if self._closed:
          return
        self._idle.append(jobs)


def _run(future: cf.Future, work: Callable[..., Any], args: tuple) -> None:
  try:
    result = work(*args)
  except BaseException as error:  # Whoever reads the future raises it.
    future.set_exception(error)
  else:
    future.set_result(result)


class Lane:
  """One attempt at one episode. An attempt that is given up keeps its lane; the next has another.

  Attributes:
    episode, record: what is played, and what was.
    agent: None until it was made.
    call: what its environment does just now, None where it waits for the engine.
    request: the engine's id of what it is asked just now.
    resets: resets that failed.
    start: where it begins, None for the initial state.
    left: whether nobody waits for it any more.
  """

  def __init__(self, episode: Episode, start: Start | None = None):
    self.episode, self.record, self.start = episode, Recorder(), start
    self.agent: Agent | None = None
    self.call: cf.Future | None = None
    self.request: int | None = None
    self.left = False
    self.resets = 0

  def close(self) -> None:
    """Closes the environment, which gives its sandbox back."""
    if self.agent is not None:
      self.agent.env.close()

  def kill(self) -> None:
    """Ends the sandbox under a running call, where the environment has one."""
    sandbox = getattr(self.agent.env.unwrapped, "sandbox", None) if self.agent else None
    if sandbox is not None:
      with contextlib.suppress(SandboxError):
        sandbox.close()


@dataclasses.dataclass(frozen=True)
class Silent:
  """A call that did not answer in time."""

  kind: str
  seconds: float

  @property
  def reason(self) -> str:
    return (
      f"the environment's {self.kind} did not answer within {self.seconds:g} s "
      f"({_SETTINGS[self.kind]})"
    )


class Environments:
  """Runs the calls of lanes and watches over them. All methods but `ring` are for one thread."""

  def __init__(self, patience: Patience):
    self.patience = patience
    self._threads = Threads()
    self._busy: dict[cf.Future, tuple[Lane, str, float]] = {}  # lane, kind, submitted at
    self._left: dict[cf.Future, float] = {}  # what nobody waits for; late from then on
    self._closing: set[cf.Future] = set()
    self._bell: cf.Future = cf.Future()

  def ring(self) -> None:
    """Ends a wait in `ready`, or else the next one; for any thread."""
    with contextlib.suppress(cf.InvalidStateError):  # it has been rung and not yet heard
      self._bell.set_result(None)

  def call(self, lane: Lane, kind: str, work: Callable[..., Any], *args: Any) -> None:
    """Runs `work(*args)` for a lane.

    Args:
      kind: "reset" or "step", which names the deadline.
    """
    lane.call = self._threads.submit(work, *args)
    self._busy[lane.call] = (lane, kind, time.monotonic())

  def ready(self, wait: float) -> list[tuple[Lane, cf.Future | Silent]]:
    """Calls that are done, and those that have been silent too long; the latter are let go.

    Args:
      wait: seconds to wait at most for the first of them; it may return without any before.
    Raises:
      TooManyAbandoned: see there.
    """
    self._check()
    done, _ = cf.wait(self._busy, timeout=0)
    if wait > 0 and not done:
      now = time.monotonic()
      patience = max(min([wait, *(self._deadline(future) - now for future in self._busy)]), 0.0)
      waited = [*self._busy, self._bell]
      done, _ = cf.wait(waited, timeout=patience, return_when=cf.FIRST_COMPLETED)
      if self._bell in done:
        done, self._bell = done - {self._bell}, cf.Future()
    # An answer that lay here while the engine was busy (compiling, say) was not late.
    now = time.monotonic()
    late = [f for f in self._busy if not f.done() and self._deadline(f) <= now]
    answers: list[tuple[Lane, cf.Future | Silent]] = []
    for future in done:
      lane, _, _ = self._busy.pop(future)
      lane.call = None
      answers.append((lane, future))
    for future in late:
      lane, kind, _ = self._busy[future]
      self.let_go(lane, grace=0.0)
      answers.append((lane, Silent(kind, getattr(self.patience, kind))))
    return answers

  def let_go(self, lane: Lane, grace: float | None = None) -> None:
    """Closes a lane's environment in the background, once its call is done or its sandbox killed.

    A lane that was let go before is left as it is.

    Args:
      grace: seconds that the call may still take; None is `Patience.grace`.
    """
    if lane.left:
      return
    lane.left = True
    grace, close = self.patience.grace if grace is None else grace, self.patience.close
    call, now = lane.call, time.monotonic()
    if call is not None:
      self._busy.pop(call, None)
      self._left[call] = now + grace
    end = self._threads.submit(self._end, lane, call, grace)
    self._closing.add(end)
    self._left[end] = now + grace + 2 * close

  def _end(self, lane: Lane, call: cf.Future | None, grace: float) -> None:
    if call is not None and not cf.wait([call], timeout=grace).done:
      lane.kill()
      if not cf.wait([call], timeout=self.patience.close).done:
        call.add_done_callback(lambda _: lane.close())  # It may yet take a sandbox.
    lane.close()

  def close(self) -> None:
    """Waits for environments that close, as long as they may; then leaves the threads."""
    cf.wait(self._left, timeout=self.patience.grace + 2 * self.patience.close)
    self._threads.close()

  def _deadline(self, future: cf.Future) -> float:
    _, kind, submitted = self._busy[future]
    return submitted + getattr(self.patience, kind)

  def _check(self) -> None:
    """Forgets what came back; raises what went wrong while closing, and when too much hangs."""
    for future in [future for future in self._left if future.done()]:
      del self._left[future]
      if future in self._closing:
        self._closing.remove(future)
        error = future.exception()
        if error is not None and not isinstance(error, SandboxError):
          raise error
    now, most = time.monotonic(), self.patience.max_abandoned
    hanging = sum(late <= now for late in self._left.values())
    if hanging > most:
      raise TooManyAbandoned(
        f"{hanging} threads hang in environments whose deadlines passed, more than "
        f"sandbox.max_abandoned={most} allows; see whether sandboxes answer (rome sandbox ps), or "
        "raise sandbox.deadline, sandbox.reset_deadline or sandbox.close_deadline"
      )
