"""The sandboxes of one host, behind a manager: starting, warm ones, watching, closing.

Everything here is about resources, nothing about requests. A reservation is made before a sandbox
starts and given back only when it has been closed. Starts run in a few threads, checks of warm
sandboxes in others, so that a hand-out never waits behind a start, and closing in yet others.

Warm sandboxes hold room like any other, and give way to what waits for it. Each is asked whether it
lives before it is handed out, and serves once.
"""

import collections
import concurrent.futures as cf
import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from rome.envs import live, owner
from rome.envs.admission import Capacity, Ledger, needs
from rome.envs.common import SandboxError, SandboxLost, SandboxSpec
from rome.envs.deaths import DeathWatch
from rome.envs.lease import LeaseLost
from rome.envs.sandbox import Sandbox

LEASE = 60.0  # seconds; the reaper renews it every round
_STARTS, _CHECKS, _CLOSES = 4, 8, 4  # threads
_REFILLS = 2  # starts of warm sandboxes at a time, fewer than _STARTS
_CLOSE_TIMEOUT = 120.0  # seconds
COUNTERS = (
  "cold warm dead_warm evicted lost start_failures close_failures job_errors leases_lost swept"
).split()

log = logging.getLogger(__name__)

# Takes a sandbox that has just answered and how it came ("cold", "warm"), or the error that kept it
# from starting; returns whether it took the sandbox. Called under the lock.
Done = Callable[[Sandbox | Exception, str], bool]


class _Shelf:
  """Warm sandboxes of one spec: how many there should be, which are ready, how many start."""

  def __init__(self, target: int):
    self.target = target
    self.ready: collections.deque[tuple[str, Sandbox]] = collections.deque()  # name, sandbox
    self.starting = 0
    self.failures = 0  # in a row
    self.retry_at = 0.0


class Stock:
  """See the module. Methods that say so need the manager's lock, which is reentrant.

  Attributes:
    ledger: who holds what; the lock guards it.
    closing: reservations whose sandboxes are being closed.
    counters: what happened so far.
  """

  def __init__(
    self,
    host: str,
    ledger: Ledger,
    warm: Mapping[SandboxSpec, int],
    make: Callable[[SandboxSpec], Sandbox],
    clock: Callable[[], float],
    lock: threading.RLock,
    freed: Callable[[], None],
  ):
    """Removes what dead owners left behind. Starts nothing yet: that is for `refill`.

    Args:
      host: its name.
      ledger: empty.
      warm: how many of each spec to hold ready.
      make: starts one.
      clock: seconds.
      lock: the manager's.
      freed: called under the lock when there may be more room, or one more is ready.
    """
    self._host = host
    self.ledger, self._make, self._clock, self._freed = ledger, make, clock, freed
    self._lock = lock
    self._shelves = {spec: _Shelf(count) for spec, count in warm.items()}
    for spec in self._shelves:
      ledger.check(needs(spec.limits))
    self.closing: dict[str, Capacity] = {}
    self.counters = collections.Counter(dict.fromkeys(COUNTERS, 0))
    self.counters["swept"] = len(live.sweep_at_start())
    self._numbers = itertools.count()
    self._lease = owner.take_lease(LEASE)
    self._watch = DeathWatch()
    pools = ((_STARTS, "start"), (_CHECKS, "check"), (_CLOSES, "close"))
    self._starts, self._checks, self._closes = (
      cf.ThreadPoolExecutor(count, thread_name_prefix=f"sandbox-{name}") for count, name in pools
    )
    self._jobs: set[cf.Future[None]] = set()
    self._ended = False

  # In.

  def fits(self, spec: SandboxSpec, host: str = "") -> bool:
    """Whether `begin` would succeed. Needs the lock."""
    if host not in ("", self._host):
      return False
    shelf = self._shelves.get(spec)
    return bool(shelf and shelf.ready) or self.ledger.fits(needs(spec.limits))

  def begin(self, name: str, spec: SandboxSpec, done: Done, host: str = "") -> None:
    """Takes a warm sandbox or starts one; there must be room. Needs the lock.

    Args:
      name: of the reservation.
      spec: what to start.
      done: gets the outcome, in another thread.
      host: the only one that will do; '' or this one.
    """
    del host  # `fits` has seen to it
    shelf = self._shelves.get(spec)
    if shelf and shelf.ready:
      warm, sandbox = shelf.ready.popleft()
      self.ledger.rename(warm, name)
      self._watch.discard(warm)
      self._submit(self._checks, self._hand_out, name, spec, sandbox, done)
    else:
      self.ledger.reserve(name, needs(spec.limits))
      self._submit(self._starts, self._start, name, spec, done)

  def make_room(self, amount: Capacity) -> None:
    """Closes warm sandboxes that keep `amount` from fitting. Needs the lock."""
    coming = [self.ledger.free().units(), *(c.units() for c in self.closing.values())]
    free = [sum(column) for column in zip(*coming, strict=True)]
    for spec, shelf in self._shelves.items():
      while shelf.ready and any(n > f for n, f in zip(amount.units(), free, strict=True)):
        self.counters["evicted"] += 1
        self.retire(*shelf.ready.pop())
        free = [f + n for f, n in zip(free, needs(spec.limits).units(), strict=True)]

  def refill(self) -> None:
    """Starts warm sandboxes where there is room. Needs the lock."""
    starting = sum(shelf.starting for shelf in self._shelves.values())
    for spec, shelf in self._shelves.items():
      while (
        starting < _REFILLS
        and len(shelf.ready) + shelf.starting < shelf.target
        and self._clock() >= shelf.retry_at
        and self.ledger.fits(needs(spec.limits))
      ):
        name = f"warm-{next(self._numbers)}"
        self.ledger.reserve(name, needs(spec.limits))
        shelf.starting += 1
        starting += 1

        def done(result: Sandbox | Exception, _: str, shelf: _Shelf = shelf, n: str = name) -> bool:
          return self._shelve(shelf, n, result)

        self._submit(self._starts, self._start, name, spec, done)

  def _shelve(self, shelf: _Shelf, name: str, result: Sandbox | Exception) -> bool:
    shelf.starting -= 1
    if isinstance(result, Exception):
      shelf.failures += 1
      shelf.retry_at = self._clock() + min(30.0, 0.2 * 2**shelf.failures)
      log.warning("a warm sandbox does not start: %s", result)
      return False
    shelf.failures = 0
    if len(shelf.ready) >= shelf.target:  # emptied meanwhile
      return False
    shelf.ready.append((name, result))
    self._freed()
    return True

  def _start(self, name: str, spec: SandboxSpec, done: Done) -> None:
    try:
      sandbox = self._make(spec)
    except Exception as error:
      with self._lock:
        self.counters["start_failures"] += 1
        done(error, "cold")
        self._free(name)
      return
    self._enter(name, sandbox, done, "cold")

  def _hand_out(self, name: str, spec: SandboxSpec, sandbox: Sandbox, done: Done) -> None:
    if sandbox.alive():
      self._enter(name, sandbox, done, "warm")
      return
    with self._lock:
      self.counters["dead_warm"] += 1
    self._close(sandbox)
    self._submit(self._starts, self._start, name, spec, done)

  def _enter(self, name: str, sandbox: Sandbox, done: Done, how: str) -> None:
    """Puts a sandbox under watch and lease, then hands it over."""
    try:
      self._watch.add(name, sandbox.pid)
      self._lease.cover(sandbox.id)
      alive = sandbox.alive()  # asked after the watch began, or its pid might be another's by now
    except (OSError, SandboxError):
      alive = False
    with self._lock:
      if not (alive and self._watch.has(name)):
        done(SandboxLost(f"sandbox {sandbox.id} ended as soon as it had started"), how)
      elif done(sandbox, how):
        if not name.startswith("warm-"):
          self.counters[how] += 1
        return
      self.retire(name, sandbox)

  def host_of(self, name: str) -> str:
    """Where the sandbox of this reservation runs."""
    del name
    return self._host

  # Out.

  def retire(self, name: str, sandbox: Sandbox) -> None:
    """Closes a sandbox in the background; its reservation ends with it. Needs the lock."""
    self._watch.discard(name)
    self.closing[name] = self.ledger.held(name)
    if self._ended:  # a start that took longer than `close` waits
      self._close(sandbox)
      return
    self._submit(self._closes, self._close_and_free, name, sandbox)

  def empty(self) -> None:
    """Closes the warm sandboxes and keeps none any more. Needs the lock."""
    for shelf in self._shelves.values():
      shelf.target = 0
      while shelf.ready:
        self.retire(*shelf.ready.popleft())

  def wait(self, timeout: float) -> list[str]:
    """Waits for the end of sandboxes, or for `wake`. Returns names that `begin` was given."""
    ended = self._watch.wait(timeout)
    with self._lock:
      for shelf in self._shelves.values():
        for entry in [entry for entry in shelf.ready if entry[0] in ended]:
          shelf.ready.remove(entry)
          self.counters["dead_warm"] += 1
          self.retire(*entry)
    return [name for name in ended if not name.startswith("warm-")]

  def wake(self) -> None:
    """Ends a `wait` in another thread."""
    self._watch.wake()

  def renew(self) -> None:
    """Renews the lease.

    Raises:
      LeaseLost: others have taken, or are taking, every sandbox here; a new lease is taken.
    """
    try:
      self._lease.renew()
    except LeaseLost:
      with self._lock:
        self.counters["leases_lost"] += 1
        for shelf in self._shelves.values():
          while shelf.ready:
            self.retire(*shelf.ready.popleft())
        self._lease.release()
        self._lease = owner.take_lease(LEASE)
      raise

  def ready(self) -> int:
    """How many warm sandboxes are ready."""
    return sum(len(shelf.ready) for shelf in self._shelves.values())

  def close(self) -> None:
    """Waits for every start and end under way, and ends the threads. Nobody may `wait` any more."""
    for _ in range(3):  # a start ends in a close
      with self._lock:
        jobs = set(self._jobs)
      cf.wait(jobs, timeout=_CLOSE_TIMEOUT)
    with self._lock:
      self._ended = True
    for pool in (self._starts, self._checks, self._closes):
      pool.shutdown(wait=False, cancel_futures=True)
    self._watch.close()
    self._lease.release()

  def _submit(self, pool: cf.ThreadPoolExecutor, job: Callable[..., None], *args: Any) -> None:
    with self._lock:
      future = pool.submit(job, *args)
      self._jobs.add(future)
    future.add_done_callback(self._finish)

  def _finish(self, future: "cf.Future[None]") -> None:
    with self._lock:
      self._jobs.discard(future)
      if not future.cancelled() and future.exception() is not None:
        self.counters["job_errors"] += 1
        log.error("a job of the sandbox manager failed", exc_info=future.exception())

  def _close_and_free(self, name: str, sandbox: Sandbox) -> None:
    self._close(sandbox)
    with self._lock:
      self.closing.pop(name, None)
      self._free(name)

  def _close(self, sandbox: Sandbox) -> None:
    try:
      sandbox.close()
    except (OSError, SandboxError) as error:  # what is left the next sweep finds
      with self._lock:
        self.counters["close_failures"] += 1
      log.warning("sandbox %s did not close: %s", sandbox.id, error)

  def _free(self, name: str) -> None:
    self.ledger.release(name)
    self._freed()
