"""Episodes on many hosts over Ray, behind the interface of `World`.

On every live node of a Ray cluster there is one actor (`rome.agent.worker.Worker`: environments and
agents, no jax); the engine and the trainer stay here. An agent that `Workers.agent` makes looks
like any other: its calls go to the host with the most free places, where its episode stays.

- Back-pressure: a host plays at most `slots` episodes; one more waits in its thread for a place.
- A host whose actor dies is lost. Calls of its episodes raise `SandboxLost`, so that they are
  invalid and begun anew at once, elsewhere, with the same randomness. A node without an actor gets
  one, so hosts may join and come back at any time.

Choice: sandboxes are near their agents, because a turn has many round trips to the sandbox and one
to the model. `rome.envs.fleet` is the other cut: remote sandboxes, agents here.

Needs Ray (`pip install rome[fleet]`). Ray itself trusts everything on its network: bind it to a
private one. Left out: snapshots that cross hosts; a start inside an expert is replayed.
"""

import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from rome.agent import Agent, NewRow
from rome.agent import worker as worker_lib
from rome.agent.world import AgentConfig, SandboxConfig, demonstration, policy_tokenizer
from rome.envs.common import SandboxError, SandboxLost
from rome.envs.fleet_link import import_ray
from rome.envs.task import Task

_LOOK = 1.0  # seconds between looks for nodes that joined
_LOST_AFTER = 15.0  # seconds without an answer after which a host is given up
_REST = 60.0  # seconds until a node on which no worker started is tried again
_JOIN = 120.0  # seconds for an actor to start
_PLACE = 300.0  # seconds that an episode waits for a place

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class WorkersConfig:
  """Hosts that play episodes.

  Attributes:
    address: of a Ray cluster, as `ray.init` takes it ("auto", "HOST:PORT"); "" plays them in the
      trainer's own process.
    slots: episodes at once on each host.
  """

  address: str = ""
  slots: int = 0

  def __post_init__(self) -> None:
    if self.address and self.slots < 1:
      raise ValueError(f"workers.slots must be at least 1 with workers.address, got {self.slots}")
    if not self.address and self.slots:
      raise ValueError(f"workers.slots must be 0 without workers.address, got {self.slots}")


@dataclasses.dataclass(eq=False)
class _Host:
  node: str
  actor: Any
  backend: str
  free: int
  lost: str = ""
  question: Any = None  # a `hello` under way, asked at `asked`
  asked: float = 0.0


class Workers:
  """The hosts of a Ray cluster. Used as `World`; a context manager. For any thread.

  Args:
    config: the cluster.
    sandbox, agent, env: as for `World`, on each host.
  Attributes:
    backend: of the sandboxes of the host that came first.
    tokenizer, context: as of `World`.
    lost: hosts lost so far.
  Raises:
    SandboxError: Ray is missing, or no host comes up; the message says why.
  """

  def __init__(
    self, config: WorkersConfig, sandbox: SandboxConfig, agent: AgentConfig, env: str
  ) -> None:
    ray = import_ray()
    self._config, self._settings = config, (sandbox, agent, config.slots, env)
    self.tokenizer, self.context, self.lost = policy_tokenizer(), agent.context, 0
    self._ours = not ray.is_initialized()
    if self._ours:
      try:
        ray.init(address=config.address, log_to_driver=False)
      except (ConnectionError, ValueError, RuntimeError) as error:
        raise SandboxError(
          f"workers.address={config.address!r}: no Ray cluster answers there ({error}); start one "
          "(ray start --head), or leave workers.address empty"
        ) from None
    self._hosts: dict[str, _Host] = {}
    self._joining: dict[str, tuple[Any, Any, float]] = {}  # node -> actor, its hello, since
    self._failed: dict[str, tuple[str, float]] = {}  # node -> why, and when it is tried again
    self._changed = threading.Condition()
    self._numbers = itertools.count(1)
    self._closed = False
    self._watch = threading.Thread(target=self._look_after, name="hosts", daemon=True)
    self._watch.start()
    with self._changed:
      self._changed.wait_for(lambda: self._hosts or (self._failed and not self._joining), _JOIN)
      if not self._hosts:
        why = next((why for why, _ in self._failed.values()), f"none started within {_JOIN:g} s")
    if not self._hosts:
      self.close()
      raise SandboxError(f"no host of the Ray cluster at {config.address!r} plays episodes: {why}")
    self.backend = next(iter(self._hosts.values())).backend

  def demonstration(self, solution: Sequence[str]) -> list[list[int]]:
    """As of `World`."""
    return demonstration(self._settings[1], self.tokenizer, solution)

  def agent(self, task: Task) -> Any:
    """An agent for one episode of `task`; it takes a place on a host when it begins."""
    return RemoteAgent(self, task)

  def hosts(self) -> list[str]:
    """Ray's ids of the nodes that play."""
    with self._changed:
      return list(self._hosts)

  def take(self, unwanted: Callable[[], bool]) -> tuple[_Host, int]:
    """A place on the host with the most free ones, and a number for an episode there.

    Args:
      unwanted: whether nobody wants the place any more; `wake` makes those who wait look.
    Raises:
      SandboxError: none became free in time.
      SandboxLost: this is closed, or the place is not wanted.
    """

    def best() -> _Host | None:
      able = [host for host in self._hosts.values() if host.free]
      return max(able, key=lambda host: host.free, default=None)

    with self._changed:
      self._changed.wait_for(lambda: self._closed or unwanted() or best(), _PLACE)
      if self._closed or unwanted():
        raise SandboxLost("the episode was ended, or the hosts that play were closed")
      host = best()
      if host is None:
        raise SandboxError(
          f"no place for an episode within {_PLACE:g} s on {len(self._hosts)} hosts of "
          f"{self._config.slots}; raise workers.slots or add hosts"
        )
      host.free -= 1
      return host, next(self._numbers)

  def give_back(self, host: _Host) -> None:
    with self._changed:
      host.free += 1
      self._changed.notify_all()

  def wake(self) -> None:
    """Makes those who wait for a place look whether they still want it."""
    with self._changed:
      self._changed.notify_all()

  def ask(self, host: _Host, method: str, *args: Any) -> Any:
    """Calls a host's actor and waits.

    Raises:
      SandboxLost: the host is lost.
      SandboxError, TimeoutError: as the agent raised there.
    """
    ray = import_ray()
    question = getattr(host.actor, method).remote(*args)
    try:
      while not ray.wait([question], timeout=_LOOK)[0]:
        if host.lost:
          raise SandboxLost(f"host {host.node[:8]} is lost: {host.lost}")
      answer = ray.get(question)
    except ray.exceptions.RayTaskError:
      raise  # what a user's code raised, with its traceback
    except ray.exceptions.RayError as error:
      self._lose(host, f"its worker ended ({type(error).__name__})")
      raise SandboxLost(f"host {host.node[:8]} is lost: {host.lost}") from None
    if isinstance(answer, BaseException):
      raise answer
    return answer

  def send(self, host: _Host, method: str, *args: Any) -> None:
    """Calls a host's actor and does not wait; what comes of it is not heard."""
    getattr(host.actor, method).options(concurrency_group="control").remote(*args)

  def _lose(self, host: _Host, reason: str) -> None:
    with self._changed:
      if host.lost:
        return
      host.lost = reason
      self._hosts.pop(host.node, None)
      self.lost += 1
      self._changed.notify_all()
    log.warning("host %s is lost: %s", host.node[:8], reason)

  def _look_after(self) -> None:
    """Gives every node without a worker one, until this is closed."""
    while not self._closed:
      try:
        self._join()
      except Exception as error:  # of Ray, while the cluster changes; the next look tells more
        log.warning("looking for hosts: %s", error)
      with self._changed:
        self._changed.wait_for(lambda: self._closed, 0.1 if self._joining else _LOOK)

  def _join(self) -> None:
    ray = import_ray()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    for host in list(self._hosts.values()):
      self._ask_after(host)
    now = time.monotonic()
    resting = {node for node, (_, until) in self._failed.items() if until > now}
    for node in alive - self._hosts.keys() - self._joining.keys() - resting:
      affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
      kind = ray.remote(
        num_cpus=0, max_concurrency=2 * self._config.slots + 2, concurrency_groups={"control": 2}
      )
      actor = kind(worker_lib.Worker).options(scheduling_strategy=affinity).remote(*self._settings)
      self._joining[node] = actor, self._hello(actor), time.monotonic()
    for node, (actor, hello, since) in list(self._joining.items()):
      if not ray.wait([hello], timeout=0)[0]:
        if time.monotonic() - since > _JOIN:
          self._give_up(node, actor, f"it did not start within {_JOIN:g} s")
        continue
      try:
        backend, _, _ = ray.get(hello)
      except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        words = str(cause).strip().splitlines() or [type(cause).__name__]
        self._give_up(node, actor, words[-1])
        continue
      with self._changed:
        del self._joining[node]
        self._hosts[node] = _Host(node, actor, backend, self._config.slots)
        self._changed.notify_all()

  def _ask_after(self, host: _Host) -> None:
    """Loses a host that does not answer; Ray itself may take minutes to miss a node."""
    ray = import_ray()
    if host.question is None:
      host.question, host.asked = self._hello(host.actor), time.monotonic()
      return
    if ray.wait([host.question], timeout=0)[0]:
      try:
        ray.get(host.question)
        host.question = None
      except ray.exceptions.RayError as error:
        self._lose(host, f"its worker ended ({type(error).__name__})")
    elif time.monotonic() - host.asked > _LOST_AFTER:
      self._lose(host, f"its worker did not answer for {_LOST_AFTER:g} s")
      ray.kill(host.actor)  # one that hangs must not come back

  def _hello(self, actor: Any) -> Any:
    return actor.hello.options(concurrency_group="control").remote()

  def _give_up(self, node: str, actor: Any, reason: str) -> None:
    import_ray().kill(actor)
    log.warning("no worker starts on node %s: %s", node[:8], reason)
    with self._changed:
      del self._joining[node]
      self._failed[node] = reason, time.monotonic() + _REST
      self._changed.notify_all()

  def close(self) -> None:
    """Ends the workers, with all they hold; and the connection, if this made it."""
    with self._changed:
      self._closed = True
      self._changed.notify_all()
    self._watch.join()
    ray = import_ray()
    actors = [host.actor for host in self._hosts.values()]
    actors += [actor for actor, _, _ in self._joining.values()]
    goodbyes = [actor.close.options(concurrency_group="control").remote() for actor in actors]
    if goodbyes:
      ray.wait(goodbyes, num_returns=len(goodbyes), timeout=60)
    for actor in actors:
      ray.kill(actor)
    if self._ours:
      ray.shutdown()

  def __enter__(self) -> "Workers":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class _RemoteSandbox:
  """What a rollout asks of a sandbox: to be ended under a call that hangs."""

  def __init__(self, agent: "RemoteAgent"):
    self._agent = agent

  def close(self) -> None:
    self._agent.kill()


class _RemoteEnv:
  """What a rollout asks of an agent's environment."""

  def __init__(self, agent: "RemoteAgent"):
    self._agent, self.sandbox = agent, _RemoteSandbox(agent)

  @property
  def unwrapped(self) -> "_RemoteEnv":
    return self

  def close(self) -> None:
    self._agent.end()


class RemoteAgent(Agent):
  """An agent on another host; used as `Agent` by the thread of its episode."""

  def __init__(self, workers: Workers, task: Task):
    super().__init__(_RemoteEnv(self), workers.tokenizer, "", 0)  # type: ignore[arg-type]
    self._workers, self._task = workers, task
    self._at: tuple[_Host, int] | None = None
    self._ended = False
    self._lock = threading.Lock()

  def begin(self) -> list[int]:
    """As `Agent.begin`; waits for a place first."""
    at = self._workers.take(lambda: self._ended)
    with self._lock:
      self._at = None if self._ended else at
    if self._at is None:
      self._workers.give_back(at[0])
      raise SandboxLost("the episode was ended")
    host, number = at
    ids = self._take(self._workers.ask(host, "begin", number, self._task))
    assert isinstance(ids, list)
    return ids

  def act(self, reply: Sequence[int]) -> list[int] | NewRow | None:
    if self._at is None:
      raise SandboxLost("the episode was ended")
    host, number = self._at
    return self._take(self._workers.ask(host, "act", number, list(reply)))

  def _take(self, answer: worker_lib.Answer) -> list[int] | NewRow | None:
    self.instruction, self.reward = answer.instruction, answer.reward
    self.end_reason = answer.end_reason
    self.turns += answer.turns
    return answer.ids

  def kill(self) -> None:
    """Ends the sandbox under a call that hangs, or the wait for a place."""
    with self._lock:
      self._ended = True
      if self._at is not None and not self._at[0].lost:
        self._workers.send(self._at[0], "kill", self._at[1])
    self._workers.wake()

  def end(self) -> None:
    """Ends the episode on its host, which gives its place back; idempotent."""
    with self._lock:
      self._ended = True
      at, self._at = self._at, None
    self._workers.wake()
    if at is not None and not at[0].lost:
      self._workers.send(at[0], "end", at[1])
      self._workers.give_back(at[0])
