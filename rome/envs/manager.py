"""The manager of one host's sandboxes: admission, a fair queue, time limits, and their end.

A creation waits in the queue until the ledger has room for its limits, or a warm sandbox of the
same spec is ready (`stock.py`). One thread notices at once when a sandbox dies by itself, renews
the lease, and enforces deadlines, idle and absolute time limits. Use is what `touch` is told: the
caller touches a sandbox whenever it uses it.

Left out: starting a failed sandbox anew. Its files are gone; whoever owns the episode decides.
"""

import collections
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from rome.envs.admission import NAMES, Capacity, Ledger, dominant_share, host_capacity, needs
from rome.envs.common import SandboxError, SandboxLost, SandboxSpec
from rome.envs.lease import LeaseLost
from rome.envs.lifecycle import MOVES, Lifecycle, State
from rome.envs.queueing import FairQueue, Ticket, timeout_error
from rome.envs.records import CreationFailed, ManagerClosed, Record, UnknownSandbox
from rome.envs.sandbox import Sandbox, make_sandbox
from rome.envs.stock import Stock

RETENTION = 600.0  # seconds that records are kept after their end
_MAX_FINISHED = 10_000  # records kept at most after their end
_COUNTERS = "created failed expired idle ttl reaper_errors".split()
_JOIN = 60.0  # seconds

log = logging.getLogger(__name__)


def make_from_spec(spec: SandboxSpec) -> Sandbox:
  """Starts a sandbox as its spec says; raises as `make_sandbox` does."""
  options: dict[str, Any] = {} if spec.network is None else {"network": spec.network}
  return make_sandbox(spec.image, spec.backend, limits=spec.limits, **options)


class Manager:
  """Thread-safe; use as a context manager, or call `close`.

  Attributes:
    host: its name.
  """

  def __init__(
    self,
    capacity: Capacity | None = None,
    *,
    warm: Mapping[SandboxSpec, int] | None = None,
    make: Callable[[SandboxSpec], Sandbox] = make_from_spec,
    interval: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Removes what dead managers left behind, and starts the warm sandboxes in the background.

    Args:
      capacity: what all sandboxes together may use; `host_capacity()` by default.
      warm: how many sandboxes of which spec to hold ready. They give way where room is short.
      make: starts one.
      interval: seconds between rounds of the reaper.
      clock: seconds, for every deadline and time limit.

    Raises:
      CapacityExceeded: a warm spec could never fit.
    """
    self.host = socket.gethostname()
    self._interval, self._clock = interval, clock
    self._lock = threading.RLock()
    self._queue = FairQueue()
    self._records: dict[str, Record] = {}
    self._tickets: dict[str, Ticket] = {}  # of records that wait in the queue
    self._finished: collections.deque[Record] = collections.deque()  # in order of their end
    self._draining = self._closed = False
    self._counters = collections.Counter(dict.fromkeys(_COUNTERS, 0))
    self._handouts, self._handout_seconds = 0, 0.0
    self._stock = self._open(capacity, warm or {}, make)
    self._thread = threading.Thread(target=self._loop, name="sandbox-reaper", daemon=True)
    with self._lock:
      self._dispatch()
    self._thread.start()

  def _open(
    self,
    capacity: Capacity | None,
    warm: Mapping[SandboxSpec, int],
    make: Callable[[SandboxSpec], Sandbox],
  ) -> Any:
    """Opens what holds the sandboxes, with the methods of `Stock`; the fleet has another."""
    ledger = Ledger(capacity or host_capacity())
    return Stock(self.host, ledger, warm, make, self._clock, self._lock, self._dispatch)

  def create(
    self,
    spec: SandboxSpec,
    *,
    tenant: str = "local",
    deadline: float = 60.0,
    wait: bool = True,
    host: str = "",
  ) -> Record:
    """Asks for a sandbox.

    Args:
      spec: what to start.
      tenant: on whose behalf; tenants take turns.
      deadline: seconds until it must run, its time in the queue included.
      wait: whether to wait until it runs; if not, the record is pending at first.
      host: the only one that will do, by name; '' for any.

    Raises:
      CapacityExceeded: it could never fit on this host.
      QueueFull: this tenant has too many waiting.
      QueueTimeout: there was no room within `deadline`.
      CreationFailed: it did not start in time, or was stopped before.
      ManagerClosed: nothing new is taken.
      SandboxError: it did not start; see `make_sandbox`.
    """
    if not 0 < deadline <= 86400:
      raise ValueError(f"deadline must be between 0 and 86400 seconds, not {deadline!r}")
    amount = needs(spec.limits)
    self._stock.ledger.check(amount)
    with self._lock:
      if self._draining:
        raise ManagerClosed(f"the manager of {self.host} takes no new sandboxes")
      now = self._clock()
      record = Record(spec, tenant, host, Lifecycle(time.time()), now, now + deadline)
      cost = min(1.0, dominant_share(amount, self._stock.ledger.total))
      ticket = Ticket(record.id, tenant, amount, cost, now, record.deadline)
      self._queue.put(ticket)
      self._records[record.id], self._tickets[record.id] = record, ticket
      self._counters["created"] += 1
      self._dispatch()
    if wait and not record.settled.wait(deadline):
      with self._lock:
        self._expire(record)
    return record.checked() if wait else record

  def fork(self, sandbox_id: str, *, deadline: float = 60.0) -> Record:
    """Makes a second sandbox with the files and session of another, on its host.

    Raises:
      SandboxError: as `create` and `Sandbox.fork`.
    """
    source = self.touch(sandbox_id).checked()
    record = self.create(source.spec, tenant=source.tenant, deadline=deadline, host=source.host)
    try:
      if source.sandbox is None or record.sandbox is None:
        raise SandboxLost(f"sandbox {sandbox_id} ended while it was forked")
      source.sandbox.fork(into=record.sandbox)
    except BaseException:
      self.delete(record.id, "the fork failed")
      raise
    return record

  @property
  def capacity(self) -> Capacity:
    """What all sandboxes together may use."""
    total: Capacity = self._stock.ledger.total
    return total

  def get(self, sandbox_id: str) -> Record:
    """Returns what is known of a sandbox. Raises UnknownSandbox."""
    self._notice(self._stock.wait(0))
    with self._lock:
      record = self._records.get(sandbox_id)
    if record is None:
      raise UnknownSandbox(f"there is no sandbox {sandbox_id!r} here, or it is long gone")
    return record

  def touch(self, sandbox_id: str) -> Record:
    """Notes that a sandbox is in use, and returns its record. Raises UnknownSandbox."""
    record = self.get(sandbox_id)
    record.touched = self._clock()
    return record

  def stop(self, sandbox_id: str, reason: str = "stopped by request") -> Record:
    """Ends a sandbox, or the wait for it; returns at once. Idempotent. Raises UnknownSandbox."""
    record = self.get(sandbox_id)
    with self._lock:
      self._end(record, reason)
      self._dispatch()
    return record

  def delete(self, sandbox_id: str, reason: str = "deleted by request") -> Record:
    """Stops a sandbox for good; its record stays for a while. Idempotent. Raises UnknownSandbox."""
    record = self.stop(sandbox_id, reason)
    with self._lock:
      record.life.delete(time.time(), reason)
    return record

  def drain(self, timeout: float) -> "list[Record]":
    """Takes nothing new, fails what waits for room, and waits for the others to end.

    Returns:
      The records of those that still run after `timeout` seconds; `close` ends them.
    """
    with self._lock:
      self._draining = True
      self._stock.empty()
      for sandbox_id in [*self._tickets]:
        self._fail(self._records[sandbox_id], ManagerClosed(f"the manager of {self.host} drains"))
    end = time.monotonic() + timeout
    while True:
      left = [record for record in self.list() if not record.life.finished]
      if not left or time.monotonic() >= end:
        return left
      time.sleep(min(0.05, max(0.0, end - time.monotonic())))

  def close(self) -> None:
    """Ends every sandbox and every thread. Idempotent."""
    with self._lock:
      if self._closed:
        return
      self._draining = self._closed = True
      self._stock.empty()
      for record in self._records.values():
        self._end(record, "the manager closes")
    self._stock.wake()
    self._thread.join(timeout=_JOIN)
    self._stock.close()

  def metrics(self) -> dict[str, float]:
    """Numbers for monitoring.

    Returns:
      "state_*": records by state; "queue_*": how many wait, and since when (seconds);
      "capacity_*", "used_*": of every resource; "warm_ready"; "closing"; "handout_seconds" and
      "handouts": time from request to hand-out, summed, and their number; "total_*": what happened.
    """
    with self._lock:
      stock, oldest = self._stock, self._queue.oldest()
      states = collections.Counter(record.state for record in self._records.values())
      used, total = stock.ledger.used(), stock.ledger.total
      return {
        **{f"state_{state}": states[state] for state in MOVES},
        "queue_length": len(self._queue),
        "queue_oldest_seconds": 0.0 if oldest is None else self._clock() - oldest,
        **{f"capacity_{name}": getattr(total, name) for name in NAMES},
        **{f"used_{name}": getattr(used, name) for name in NAMES},
        "warm_ready": stock.ready(),
        "closing": len(stock.closing),
        "handouts": self._handouts,
        "handout_seconds": self._handout_seconds,
        **{f"total_{name}": n for name, n in {**self._counters, **stock.counters}.items()},
      }

  def __enter__(self) -> "Manager":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _dispatch(self) -> None:
    """Admits what has room now. Needs the lock."""
    if self._closed:
      return
    while (ticket := self._queue.pop(self._clock(), self._fits)) is not None:
      record = self._records[ticket.key]
      del self._tickets[record.id]

      def done(result: Sandbox | Exception, how: str, record: Record = record) -> bool:
        return self._settle(record, result, how)

      self._stock.begin(record.id, record.spec, done, record.host)
    first = self._queue.first()
    if first is not None:
      self._stock.make_room(first.needs)
    elif not self._draining:
      self._stock.refill()

  def _fits(self, ticket: Ticket) -> bool:
    record = self._records[ticket.key]
    return self._stock.fits(record.spec, record.host)

  def _settle(self, record: Record, result: Sandbox | Exception, how: str) -> bool:
    """Needs the lock. Returns whether the record takes the sandbox."""
    if record.life.finished:  # stopped, or too late
      return False
    if isinstance(result, Exception):
      self._fail(record, result)
      return False
    now = self._clock()
    record.sandbox, record.started, record.touched = result, now, now
    record.host = self._stock.host_of(record.id)
    record.life.move("running", time.time(), f"started ({how})")
    record.settled.set()
    self._handouts += 1
    self._handout_seconds += now - record.requested
    return True

  def _end(self, record: Record, reason: str, state: State = "stopped") -> None:
    """Moves a record to its end, whatever it was doing. Needs the lock."""
    if record.life.finished:
      return
    ticket = self._tickets.pop(record.id, None)
    if ticket is not None:
      self._queue.cancel(ticket)
    sandbox, record.sandbox = record.sandbox, None
    record.life.move(state, time.time(), reason)
    record.ended = self._clock()
    record.settled.set()
    self._finished.append(record)
    if sandbox is not None:
      self._stock.retire(record.id, sandbox)

  def _fail(self, record: Record, error: Exception) -> None:
    """Needs the lock."""
    if not record.life.finished:
      text = str(error) if isinstance(error, SandboxError) else f"{type(error).__name__}: {error}"
      record.error, record.cause = text, error
      self._counters["failed"] += 1
      self._end(record, text, "failed")

  def _expire(self, record: Record) -> None:
    """Fails a record that is still pending at its deadline. Needs the lock."""
    if record.state != "pending":
      return
    self._counters["expired"] += 1
    ticket, now = self._tickets.get(record.id), self._clock()
    if ticket is not None:
      short = self._stock.ledger.shortage(ticket.needs)
      self._fail(record, timeout_error(ticket, now, short, len(self._queue) - 1))
    else:
      waited = now - record.requested
      self._fail(record, CreationFailed(f"{record.id} was still starting after {waited:.1f} s"))
    self._dispatch()

  def _loop(self) -> None:
    while not self._closed:
      try:
        self._notice(self._stock.wait(self._interval))
        self.reap()
      except Exception:  # or nothing would ever be reaped again
        with self._lock:
          self._counters["reaper_errors"] += 1
        log.exception("a round of the sandbox reaper failed")
        time.sleep(min(1.0, self._interval))

  def reap(self) -> None:
    """One round: renews the lease and enforces every deadline and time limit."""
    try:
      self._stock.renew()
    except LeaseLost as error:
      with self._lock:
        for record in self._records.values():
          if record.state == "running":
            self._fail(record, error)
    with self._lock:
      now = self._clock()
      for record in self._records.values():
        if record.state == "pending" and now >= record.deadline:
          self._expire(record)
        elif record.state == "running" and now - record.started >= record.spec.ttl:
          self._counters["ttl"] += 1
          self._end(record, f"its {record.spec.ttl:g} s are over")
        elif record.state == "running" and now - record.touched >= record.spec.idle_ttl:
          self._counters["idle"] += 1
          self._end(record, f"it was not used for {record.spec.idle_ttl:g} s")
      self._forget(now)
      self._dispatch()

  def _forget(self, now: float) -> None:
    """Needs the lock."""
    while self._finished and (
      len(self._finished) > _MAX_FINISHED or now - self._finished[0].ended >= RETENTION
    ):
      record = self._finished.popleft()
      record.life.delete(time.time(), "forgotten")
      del self._records[record.id]

  def _notice(self, names: "list[str]") -> None:
    """Takes note of sandboxes that ended by themselves."""
    for name in names:
      with self._lock:
        record = self._records.get(name)
        sandbox = record.sandbox if record else None
      if record is None or sandbox is None:
        continue
      reason = sandbox.lost_reason()  # may ask Podman, so not under the lock
      with self._lock:
        self._stock.counters["lost"] += 1
        self._fail(record, SandboxLost(f"sandbox {record.id} is lost: {reason}"))
        self._dispatch()

  def list(self, tenant: str | None = None) -> "list[Record]":
    """Returns the records of a tenant, of all by default, oldest first."""
    with self._lock:
      return [r for r in self._records.values() if tenant is None or r.tenant == tenant]
