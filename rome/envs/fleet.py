"""Sandboxes on many hosts over Ray, behind the interface of `Manager`.

`Fleet` is a `Manager` whose sandboxes live elsewhere: queue, deadlines, time limits and records are
the same code; `_Hosts` stands in for `Stock`. On every live Ray node there is one actor
(`fleet_worker.Worker`, which holds a manager), and `placement.Scheduler` chooses between them. An
actor that dies, or does not answer for a while, is lost: its sandboxes are reported failed, its
capacity leaves, the others go on. A node without an actor gets a new one, so a host whose worker
was killed rejoins, empty.

Needs Ray (`pip install rome[fleet]`), which the caller has connected to (`ray.init`). Ray itself
trusts everything on its network: bind it to a private one.
"""

import collections
import concurrent.futures as cf
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from rome.envs import fleet_worker
from rome.envs.admission import Capacity, CapacityExceeded, needs
from rome.envs.common import SandboxError, SandboxLost, SandboxSpec
from rome.envs.fleet_link import ANSWER, Host, import_ray
from rome.envs.fleet_sandbox import FleetSandbox
from rome.envs.manager import Manager
from rome.envs.network.policy import NetworkPolicy
from rome.envs.placement import Scheduler
from rome.envs.records import Record
from rome.envs.sandbox import Sandbox
from rome.envs.stock import Done

_THREADS = 32  # creations and ends under way at once
_CALLS = 128  # calls of one worker under way at once; more wait
_GROUPS = {"control": 4, "start": 8}  # beside them, for what must not wait behind commands
_JOIN_TIMEOUT = 120.0  # seconds for a worker to start

log = logging.getLogger(__name__)


class _Ledger:
  """What `Manager` asks of a ledger, over all hosts."""

  def __init__(self, scheduler: Scheduler):
    self._scheduler = scheduler

  @property
  def total(self) -> Capacity:
    return self._scheduler.total()

  def used(self) -> Capacity:
    return self._scheduler.used()

  def check(self, amount: Capacity) -> None:
    if self._scheduler.hosts and not self._scheduler.could_fit(amount):
      raise CapacityExceeded(f"no host of the fleet could ever hold {amount}; ask for lower limits")

  def shortage(self, amount: Capacity) -> str:
    if not self._scheduler.hosts:
      return "hosts: none has joined"
    rows = [f"{h.name}: {h.ledger.shortage(amount)}" for h in self._scheduler.hosts.values()]
    return "; ".join(rows[:3]) + (f"; and so on for {len(rows)} hosts" if len(rows) > 3 else "")


class _Hosts:
  """The fleet's stand-in for `Stock`: the same methods, over workers on other hosts.

  Attributes:
    ledger, closing, counters: as of `Stock`.
    scheduler: who is where.
  """

  def __init__(
    self,
    fleet: "Fleet",
    capacity: Capacity | None,
    warm: Mapping[SandboxSpec, int],
    lock: Any,
    freed: Callable[[], None],
  ):
    self._fleet, self._capacity, self._warm = fleet, capacity, dict(warm)
    self._lock, self._freed = lock, freed
    self.scheduler = Scheduler(fleet.strategy)
    self.ledger = _Ledger(self.scheduler)
    self.closing: dict[str, Capacity] = {}
    names = "started lost hosts_joined hosts_lost start_failures".split()
    self.counters = collections.Counter(dict.fromkeys(names, 0))
    self._hosts: dict[str, Host] = {}
    self._joining: dict[str, tuple[Any, Any, float]] = {}  # node -> actor, its hello, since
    self._running: dict[str, FleetSandbox] = {}
    self._ended: list[str] = []
    self._bell = threading.Event()
    self._threads = cf.ThreadPoolExecutor(_THREADS, thread_name_prefix="fleet")

  # In.

  def fits(self, spec: SandboxSpec, host: str = "") -> bool:
    return self.scheduler.find(needs(spec.limits), spec.image, host or None) is not None

  def begin(self, name: str, spec: SandboxSpec, done: Done, host: str = "") -> None:
    chosen = self.scheduler.place(name, needs(spec.limits), spec.image, host or None)
    assert chosen is not None, "fits() comes first"
    self._threads.submit(self._start, self._hosts[chosen], name, spec, done)

  def _start(self, host: Host, name: str, spec: SandboxSpec, done: Done) -> None:
    try:
      left = max(0.1, self._fleet.time_left(name))
      what = host.ask("create", name, spec, left, timeout=left + ANSWER)
      sandbox = FleetSandbox(self._fleet, host, name, spec, what)
    except Exception as error:
      with self._lock:
        self.counters["start_failures"] += 1
        done(error, "")
      self._delete(host, name)
      return
    with self._lock:
      if host.lost:
        done(SandboxLost(f"host {host.name} is lost: {host.lost}"), "")
        return
      self._running[name] = sandbox
      if done(sandbox, f"on {host.name}"):
        self.counters["started"] += 1
      else:
        self.retire(name, sandbox)

  def host_of(self, name: str) -> str:
    return self.scheduler.where(name) or ""

  def make_room(self, amount: Capacity) -> None:
    """The workers' warm sandboxes give way by themselves."""

  def refill(self) -> None:
    """The workers refill their own."""

  def empty(self) -> None:
    """No warm sandboxes here."""

  def renew(self) -> None:
    """The workers have leases of their own."""

  def ready(self) -> int:
    return 0

  # Out.

  def retire(self, name: str, sandbox: Sandbox) -> None:
    mine = cast(FleetSandbox, sandbox)
    mine.retired()
    self._running.pop(name, None)
    if not mine.host.lost:  # else the reservation went with it
      self.closing[name] = needs(mine.limits)
      self._threads.submit(self._delete, mine.host, name)

  def _delete(self, host: Host, name: str) -> None:
    """Ends what there is of a sandbox, then gives its room back."""
    try:
      host.ask("delete", name)
    except SandboxError as error:
      log.warning("sandbox %s cannot be ended: %s", name, error)
    with self._lock:
      self.closing.pop(name, None)
      self.scheduler.release(name)
      self._freed()

  def wait(self, timeout: float) -> list[str]:
    """Looks after the hosts for `timeout` seconds; 0 only tells what is known."""
    if timeout > 0:
      end = time.monotonic() + timeout
      self._poll(timeout)
      self._join()
      self._bell.wait(max(0.0, end - time.monotonic()))
    with self._lock:
      ended, self._ended = self._ended, []
    return ended

  def _poll(self, timeout: float) -> None:
    ray, hosts = import_ray(), list(self._hosts.values())
    for host in hosts:
      if host.question is None:
        host.question, host.asked = host.send("poll"), time.monotonic()
    if not hosts:
      return
    questions = [host.question for host in hosts]
    ready, _ = ray.wait(questions, num_returns=len(questions), timeout=timeout)
    for host in hosts:
      if host.question in ready:
        try:
          self._note(ray.get(host.question))
          host.question = None
        except ray.exceptions.RayError as error:
          self._lose(host, f"its worker ended ({type(error).__name__})")
      elif time.monotonic() - host.asked > self._fleet.lost_after:
        self._lose(host, f"its worker did not answer for {self._fleet.lost_after:g} s")

  def _note(self, reasons: Mapping[str, str]) -> None:
    """Takes note of sandboxes that ended by themselves."""
    with self._lock:
      for name in reasons.keys() & self._running.keys():
        self._running.pop(name).ended(reasons[name])
        self._ended.append(name)

  def _lose(self, host: Host, reason: str) -> None:
    """A host is lost, with all it held."""
    log.warning("host %s is lost: %s", host.name, reason)
    with self._lock:
      host.lost = reason
      del self._hosts[host.name]
      lost = self.scheduler.lose(host.name)
      self._note(dict.fromkeys(lost, f"host {host.name} is lost: {reason}"))
      self.counters["hosts_lost"] += 1
      self._freed()
    import_ray().kill(host.actor)  # one that hangs must not come back

  def _join(self) -> None:
    """Gives every node without a worker one, and takes those that have come up."""
    ray = import_ray()
    nodes = {n["NodeID"]: n for n in ray.nodes() if n["Alive"]}
    have = {host.node for host in self._hosts.values()}
    for node in nodes.keys() - have - self._joining.keys():
      affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
      kind = ray.remote(num_cpus=0, max_concurrency=_CALLS, concurrency_groups=_GROUPS)
      made = kind(fleet_worker.Worker).options(scheduling_strategy=affinity)
      actor = made.remote(self._capacity, self._warm)
      self._joining[node] = actor, actor.hello.remote(), time.monotonic()
    for node, (actor, hello, since) in list(self._joining.items()):
      if not ray.wait([hello], timeout=0)[0]:
        if time.monotonic() - since > _JOIN_TIMEOUT:
          log.warning("no worker starts on node %s within %g s", node, _JOIN_TIMEOUT)
          ray.kill(actor)
          del self._joining[node]
        continue
      del self._joining[node]
      try:
        capacity, _ = ray.get(hello)
      except ray.exceptions.RayError as error:
        log.warning("no worker starts on node %s: %s", node, error)
        continue
      name = f"{nodes[node]['NodeManagerHostname']}-{node[:8]}" if node in nodes else node
      with self._lock:
        self._hosts[name] = Host(name, node, actor)
        self.scheduler.join(name, capacity)
        self.counters["hosts_joined"] += 1
        self._freed()

  def wake(self) -> None:
    self._bell.set()

  def close(self) -> None:
    """Ends the workers, with all they hold."""
    self._threads.shutdown(wait=True)
    ray = import_ray()
    actors = [host.actor for host in self._hosts.values()]
    actors += [actor for actor, _, _ in self._joining.values()]
    goodbyes = [actor.close.remote() for actor in actors]
    if goodbyes:
      ray.wait(goodbyes, num_returns=len(goodbyes), timeout=60)
    for actor in actors:
      ray.kill(actor)


class Fleet(Manager):
  """See the module and `Manager`, whose methods it has; a context manager too.

  Attributes:
    strategy, lost_after: as given.
  """

  def __init__(
    self,
    capacity: Capacity | None = None,
    *,
    warm: Mapping[SandboxSpec, int] | None = None,
    strategy: str = "pack",
    lost_after: float = 15.0,
    interval: float = 1.0,
  ):
    """Starts a worker on every live node; returns at once, and creations wait for the first one.

    Args:
      capacity: of each host; by default what each finds itself to have.
      warm: how many sandboxes of which spec each host holds ready.
      strategy: "pack" or "spread"; see `placement`.
      lost_after: seconds without an answer after which a host is given up.
      interval: seconds between rounds.

    Raises:
      SandboxError: Ray is not installed, or not connected to.
    """
    if not import_ray().is_initialized():
      raise SandboxError("a fleet needs a connection to Ray: call ray.init(address=...) first")
    self.strategy, self.lost_after = strategy, lost_after
    super().__init__(capacity, warm=warm, interval=interval)

  def _open(self, capacity: Any, warm: Any, make: Any) -> Any:
    del make
    return _Hosts(self, capacity, warm, self._lock, self._dispatch)

  def hosts(self) -> dict[str, Capacity]:
    """The hosts that are here, and what each has."""
    with self._lock:
      return {name: h.ledger.total for name, h in self._stock.scheduler.hosts.items()}

  def time_left(self, sandbox_id: str) -> float:
    """Seconds until a sandbox must run."""
    with self._lock:
      record = self._records.get(sandbox_id)
      return record.deadline - self._clock() if record else 0.0

  def twin(self, sandbox_id: str, network: NetworkPolicy | None = None) -> Record:
    """Creates a sandbox of the image and limits of another, for its tenant; raises as `create`."""
    source = self.get(sandbox_id)
    spec = dataclasses.replace(source.spec, network=network)
    return self.create(spec, tenant=source.tenant)
