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
import functools
import logging
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from rome.envs import fleet_worker
from rome.envs.admission import Capacity, CapacityExceeded, needs
from rome.envs.common import SandboxError, SandboxLost, SandboxSpec
from rome.envs.fleet_worker import Answer
from rome.envs.manager import Manager
from rome.envs.placement import Scheduler
from rome.envs.records import Record
from rome.envs.sandbox import Sandbox
from rome.envs.stock import Done

_THREADS = 32  # creations under way at once
_CALLS = 128  # calls of one worker under way at once; more wait
_GROUPS = {"control": 4, "start": 8}  # of them, for what must not wait behind commands
_JOIN_TIMEOUT = 120.0  # seconds for a worker to start
_STEP = 1.0  # seconds after which a call looks whether its worker is lost

log = logging.getLogger(__name__)


def _ray() -> Any:
  try:
    import ray
  except ImportError as error:
    raise SandboxError("a fleet needs Ray: pip install 'rome[fleet]'") from error
  if not ray.is_initialized():
    raise SandboxError("a fleet needs a connection to Ray: call ray.init(address=...) first")
  return ray


class _Link:
  """The actor of one host."""

  def __init__(self, host: str, node: str, actor: Any):
    self.host, self.node, self.actor = host, node, actor
    self.lost = ""  # why, once it is
    self.question: Any = None  # the poll under way
    self.asked = time.monotonic()

  def ask(self, method: str, *args: Any) -> Any:
    """Calls the actor and waits, as long as it is not lost. Raises SandboxLost."""
    ray = _ray()
    try:
      question = self.send(method, *args)
      while not ray.wait([question], timeout=_STEP)[0]:
        if self.lost:
          raise SandboxLost(f"host {self.host} is lost: {self.lost}")
      return ray.get(question)
    except ray.exceptions.RayActorError as error:
      raise SandboxLost(f"host {self.host} is lost: its worker ended") from error
    except ray.exceptions.RayError as error:
      raise SandboxError(f"host {self.host}: {error}") from error

  def send(self, method: str, *args: Any) -> Any:
    """Calls the actor; returns Ray's reference to the result."""
    group = {"poll": "control", "delete": "control", "create": "start"}.get(method)
    call = getattr(self.actor, method)
    return (call.options(concurrency_group=group) if group else call).remote(*args)

  def value(self, method: str, *args: Any) -> Any:
    """As `ask`, for methods with an `Answer`; raises the error that it tells."""
    return _value(self.ask(method, *args))


def _value(answer: Answer) -> Any:
  kind, value, text = answer
  if kind == "error":
    raise fleet_worker.ERRORS[value](text)
  return value


class RemoteObject:
  """A session, upload or download that stayed with its sandbox; has the methods of its class."""

  def __init__(
    self, link: _Link, name: str, number: int, used: Callable[[], None], end: str = "close"
  ):
    self._link, self._name, self._number, self._used, self._end = link, name, number, used, end

  def __getattr__(self, method: str) -> Any:
    if method in fleet_worker.METHODS:
      return functools.partial(self._call, method)
    if method in fleet_worker.ATTRIBUTES:
      return self._call(method)
    raise AttributeError(f"{method!r} is not there over the fleet")

  def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
    self._used()
    answer = self._link.ask("call", self._name, self._number, method, args, kwargs)
    self._used()
    value = _value(answer)
    if answer[0] == "object":
      end = "drop" if answer[2] == "Upload" else "close"
      return RemoteObject(self._link, self._name, value, self._used, end)
    return value

  def __enter__(self) -> "RemoteObject":
    return self

  def __exit__(self, *_: object) -> None:
    getattr(self, self._end)()


class RemoteSandbox(RemoteObject):
  """A sandbox on another host, with the interface of `Sandbox`.

  Calls raise SandboxLost once its worker is lost.

  Attributes:
    id, backend, image, workdir, limits: as of a `Sandbox`.
    host: where it runs.
  """

  def __init__(
    self, hosts: "_Hosts", link: _Link, name: str, spec: SandboxSpec, what: tuple[str, ...]
  ):
    super().__init__(link, name, 0, lambda: hosts.used(name))
    self.id, self.backend, self.image, self.workdir = what
    self.limits, self.host = spec.limits, link.host
    self._hosts = hosts

  def upload(self, local: str | os.PathLike[str], remote: str, **options: Any) -> Any:
    """See `Sandbox.upload`; the files cross in parts."""
    source = pathlib.Path(local)
    if source.is_symlink() or not (source.is_file() or source.is_dir()):
      raise SandboxError(f"upload: {source} is neither a file nor a directory")
    with tempfile.TemporaryDirectory(prefix="rome-fleet-") as scratch:
      archive = pathlib.Path(scratch) / "tar"
      fleet_worker.pack(source, archive)
      token, _ = self._link.value("spool", self._name, None, {})
      try:
        with open(archive, "rb") as file:
          while part := file.read(fleet_worker.CHUNK):
            self._used()
            self._link.ask("append", token, part)
        return self._link.value("upload", self._name, token, remote, options)
      finally:
        self._drop(token)

  def download(self, remote: str, local: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """See `Sandbox.download`; the files cross in parts."""
    target = pathlib.Path(local)
    if args:
      (kwargs["max_bytes"],) = args
    if target.exists() or target.is_symlink():
      raise FileExistsError(f"download: {target} exists")
    token, size = self._link.value("spool", self._name, remote, kwargs)
    try:
      with tempfile.TemporaryDirectory(prefix=".rome-", dir=target.absolute().parent) as scratch:
        archive, offset = pathlib.Path(scratch) / "tar", 0
        with open(archive, "wb") as file:
          while offset < size:
            self._used()
            part = self._link.ask("read", token, offset)
            offset += file.write(part)
            if not part:
              raise SandboxError(f"download: {remote} ended early")
        os.rename(fleet_worker.unpack(archive, pathlib.Path(scratch)), target)
    finally:
      self._drop(token)

  def fork(self, into: "RemoteSandbox | None" = None) -> "RemoteSandbox":
    """See `Sandbox.fork`; the fork runs on the same host, in a record of its own."""
    if into is None:
      return cast(RemoteSandbox, self._hosts.fleet.fork(self._name).sandbox)
    if into.host != self.host:
      raise SandboxError(f"a fork stays on its host: {self.host}, not {into.host}")
    self._link.value("fork", self._name, into._name)
    return into

  def close(self) -> None:
    """Ends it, as the fleet's `stop` does. Idempotent."""
    self._hosts.fleet.stop(self._name, "closed")

  def lost_reason(self) -> str:
    """Why it ended, once it has."""
    return self._hosts.reasons.get(self._name) or self._link.lost or "it ended by itself"

  def _drop(self, token: str) -> None:
    try:
      self._link.ask("drop", token)
    except SandboxLost:
      pass


class _Total:
  """What `Manager` asks of a ledger, over all hosts."""

  def __init__(self, scheduler: Scheduler):
    self._scheduler = scheduler

  @property
  def total(self) -> Capacity:
    return self._scheduler.total()

  def used(self) -> Capacity:
    return self._scheduler.used()

  def check(self, amount: Capacity) -> None:
    hosts = self._scheduler.hosts.values()
    if hosts and not self._scheduler.could_fit(amount):
      raise CapacityExceeded(f"no host of the fleet could ever hold {amount}; ask for lower limits")

  def shortage(self, amount: Capacity) -> str:
    if not self._scheduler.hosts:
      return "hosts: none has joined"
    rows = [f"{h.name}: {h.ledger.shortage(amount)}" for h in self._scheduler.hosts.values()]
    return "; ".join(rows[:3]) + (f"; and so on for {len(rows)} hosts" if len(rows) > 3 else "")


class _Hosts:
  """The fleet's stand-in for `Stock`: the same methods, over workers on other hosts."""

  def __init__(
    self,
    fleet: "Fleet",
    capacity: Capacity | None,
    warm: Mapping[SandboxSpec, int],
    lock: Any,
    freed: Callable[[], None],
  ):
    self.fleet, self._capacity, self._warm, self._lock, self._freed = (
      fleet,
      capacity,
      dict(warm),
      lock,
      freed,
    )
    self._scheduler = Scheduler(fleet.strategy)
    self.ledger = _Total(self._scheduler)
    self.closing: dict[str, Capacity] = {}
    self.reasons: dict[str, str] = {}
    self.counters = collections.Counter(
      {"started": 0, "lost": 0, "hosts_joined": 0, "hosts_lost": 0, "start_failures": 0}
    )
    self._links: dict[str, _Link] = {}  # by host
    self._joining: dict[str, tuple[Any, Any, float]] = {}  # node -> actor, its hello, since
    self._ended: list[str] = []
    self._bell = threading.Event()
    self._threads = cf.ThreadPoolExecutor(_THREADS, thread_name_prefix="fleet")
    self._closed = False

  def used(self, name: str) -> None:
    """A sandbox is in use."""
    record = self.fleet.record(name)
    if record is not None:
      record.touched = self.fleet.now()

  def fits(self, spec: SandboxSpec, host: str = "") -> bool:
    return self._scheduler.find(needs(spec.limits), spec.image, host or None) is not None

  def begin(self, name: str, spec: SandboxSpec, done: Done, host: str = "") -> None:
    chosen = self._scheduler.place(name, needs(spec.limits), spec.image, host or None)
    assert chosen is not None, "fits() comes first"
    self._threads.submit(self._start, self._links[chosen], name, spec, done)

  def _start(self, link: _Link, name: str, spec: SandboxSpec, done: Done) -> None:
    try:
      record = self.fleet.record(name)
      left = record.deadline - self.fleet.now() if record else 1.0
      what = link.value("create", name, spec, max(0.1, left))
      proxy = cast(Sandbox, RemoteSandbox(self, link, name, spec, what))
    except Exception as error:
      with self._lock:
        self.counters["start_failures"] += 1
        done(error, "")
        self._scheduler.release(name)
        self._freed()
      return
    with self._lock:
      if link.lost:
        done(SandboxLost(f"host {link.host} is lost: {link.lost}"), "")
      elif done(proxy, f"on {link.host}"):
        self.counters["started"] += 1
      else:
        self.retire(name, proxy)

  def make_room(self, amount: Capacity) -> None:
    """The workers' warm sandboxes give way by themselves."""

  def refill(self) -> None:
    """The workers refill their own."""

  def host_of(self, name: str) -> str:
    return self._scheduler.where(name) or ""

  def retire(self, name: str, sandbox: Sandbox) -> None:
    proxy = cast(RemoteSandbox, sandbox)
    if proxy._link.lost:
      self.reasons.pop(name, None)  # the reservation went with the host
      return
    self.closing[name] = needs(proxy.limits)
    self._threads.submit(self._delete, proxy._link, name)

  def _delete(self, link: _Link, name: str) -> None:
    try:
      link.ask("delete", name)
    except SandboxLost:
      pass
    with self._lock:
      self.closing.pop(name, None)
      self.reasons.pop(name, None)
      self._scheduler.release(name)
      self._freed()

  def empty(self) -> None:
    """No warm sandboxes here."""

  def wait(self, timeout: float) -> list[str]:
    """Looks after the hosts for `timeout` seconds; 0 only tells what is known."""
    if timeout > 0 and not self._closed:
      end = time.monotonic() + timeout
      self._poll(timeout)
      self._join()
      self._bell.wait(max(0.0, min(end - time.monotonic(), timeout)))
    with self._lock:
      ended, self._ended = self._ended, []
    return ended

  def _poll(self, timeout: float) -> None:
    ray = _ray()
    links = list(self._links.values())
    for link in links:
      if link.question is None:
        link.question, link.asked = link.send("poll"), time.monotonic()
    if not links:
      return
    questions = [link.question for link in links]
    ready, _ = ray.wait(questions, num_returns=len(questions), timeout=timeout)
    for link in links:
      if link.question in ready:
        try:
          ended = ray.get(link.question)
        except ray.exceptions.RayError as error:
          self.lose(link, f"its worker ended ({type(error).__name__})")
          continue
        link.question = None
        with self._lock:
          for name, reason in ended.items():
            if name not in self.reasons and self._scheduler.where(name) is not None:
              self.reasons[name] = reason
              self._ended.append(name)
      elif time.monotonic() - link.asked > self.fleet.lost_after:
        self.lose(link, f"its worker did not answer for {self.fleet.lost_after:g} s")

  def lose(self, link: _Link, reason: str) -> None:
    """A host is lost, with all it held."""
    log.warning("host %s is lost: %s", link.host, reason)
    with self._lock:
      if self._links.get(link.host) is not link:
        return
      link.lost = reason
      del self._links[link.host]
      lost = self._scheduler.lose(link.host)
      self.counters["hosts_lost"] += 1
      for name in lost:
        self.reasons[name] = f"host {link.host} is lost: {reason}"
      self._ended += lost
      self._freed()
    _ray().kill(link.actor)  # one that hangs must not come back with sandboxes that are given up

  def _join(self) -> None:
    """Gives every node without a worker one, and takes those that have come up."""
    ray = _ray()
    nodes = {n["NodeID"]: n for n in ray.nodes() if n["Alive"]}
    have = {link.node for link in self._links.values()}
    for node in nodes.keys() - have - self._joining.keys():
      strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
      kind = ray.remote(num_cpus=0, max_concurrency=_CALLS, concurrency_groups=_GROUPS)
      actor = (
        kind(fleet_worker.Worker)
        .options(scheduling_strategy=strategy)
        .remote(self._capacity, self._warm)
      )
      self._joining[node] = actor, actor.hello.remote(), time.monotonic()
    for node, (actor, hello, since) in list(self._joining.items()):
      if not ray.wait([hello], timeout=0)[0]:
        if time.monotonic() - since > _JOIN_TIMEOUT:
          ray.kill(actor)
          del self._joining[node]
        continue
      del self._joining[node]
      try:
        capacity, _ = ray.get(hello)
      except ray.exceptions.RayError as error:
        log.warning("no worker starts on node %s: %s", node, error)
        continue
      host = f"{nodes[node]['NodeManagerHostname']}-{node[:8]}" if node in nodes else node
      with self._lock:
        self._links[host] = _Link(host, node, actor)
        self._scheduler.join(host, capacity)
        self.counters["hosts_joined"] += 1
        self._freed()

  def wake(self) -> None:
    self._bell.set()

  def renew(self) -> None:
    """The workers have leases of their own."""

  def ready(self) -> int:
    return 0

  def close(self) -> None:
    """Ends the workers, with all they hold."""
    self._closed = True
    self._threads.shutdown(wait=True)
    ray = _ray()
    actors = [link.actor for link in self._links.values()]
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
    """
    _ray()
    self.strategy, self.lost_after = strategy, lost_after
    super().__init__(capacity, warm=warm, interval=interval)

  def _open(self, capacity: Any, warm: Any, make: Any) -> Any:
    del make
    return _Hosts(self, capacity, warm, self._lock, self._dispatch)

  def record(self, name: str) -> Record | None:
    """What is known of a sandbox; None if nothing."""
    return self._records.get(name)

  def now(self) -> float:
    """The time by this manager's clock."""
    return self._clock()

  def hosts(self) -> dict[str, Capacity]:
    """The hosts that are here, and what each has."""
    with self._lock:
      return {name: h.ledger.total for name, h in self._stock._scheduler.hosts.items()}
