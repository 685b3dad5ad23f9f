"""Rollout that goes on while training does: a producer of finished groups, and its buffer.

The producer is a thread that plays episodes without end; the trainer publishes weights to it and
fetches batches from it. Per update v: `publish` the weights that v updates made, `fetch` a batch,
compute the gradient while the producer goes on under these weights (section 2.2 of
arXiv:2512.24873).

- A group is admitted to update v if none of its trajectories began more than `max_staleness`
  versions before v, else it is dropped, counted, and another one is played (its instance is not
  played again). Choice: a trajectory begins with the version that sampled its first chunk, the
  oldest of its chunks.
- No more groups are under way than `max_staleness` + 1 updates need, so most are never too old:
  those are that others overtook.
- `publish` stops generation between two tokens. A reply that is interrupted is discarded and asked
  again with the same context, so one version samples all of a chunk; a trajectory may span several.
- Groups are taken in the order in which they were completed. What a batch holds depends on timing
  then, unless max_staleness is 0, which gives the batches of `EpisodeRunner.run`.

Devices that generate may also be the trainer's (`lent`): they leave the engines when a batch is
fetched and come back with the next weights, so that between the two they are the trainer's alone.
What they were generating begins anew on the others, and nothing is lost (`EnginePool.shrink`).

Choice: weights are published before a batch is waited for, not after, so that what is still to be
played for it is played by the newest weights; with max_staleness=0 nothing else would end.

Left out: keeping the open part of an episode over a restart. Its sandbox is gone; the instance is
played again from its beginning, with the same randomness.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax

from rome.envs.task import Task
from rome.rollout.crew import Crew, RolloutStats, Setting, Starts
from rome.rollout.engine import EnginePool
from rome.rollout.groups import Grouping, Groups, Member
from rome.trajectory import Trajectory

_PATIENCE = 1800.0  # seconds that the producer may take to come round; a turn may compile


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """Where a stream stands; another one goes on from it.

  Attributes:
    instance: number of the next instance that nobody has taken.
    open: instances under way, which are played again.
    buffer: trajectories of the groups that are complete and not fetched, in that order.
  """

  instance: int
  open: tuple[int, ...] = ()
  buffer: tuple[Trajectory, ...] = ()


class Stream(Crew):
  """A producer of groups and its buffer. A context manager; the thread lives within it.

  Args:
    setting: see there. The engine is this stream's alone until it is closed.
    key: base key, as for `EpisodeRunner.run`.
    tasks: the task of an instance, by its number.
    start: where to begin.
    grouping: members of a group; its `refills` are of one update.
    groups: groups an update.
    max_staleness: versions that a trajectory may have begun before the update it is used for.
    updates: how many will be fetched; nothing is begun for more.
    starts: where a member begins; called in the producer's thread.
    lent: devices that do not generate from a fetch to the next publication, some of those of an
      `EnginePool`.
  """

  def __init__(
    self,
    setting: Setting,
    key: chex.PRNGKey,
    tasks: Callable[[int], Task],
    start: Snapshot,
    grouping: Grouping,
    groups: int,
    max_staleness: int,
    updates: int,
    starts: Starts,
    lent: Sequence[jax.Device] = (),
  ):
    self._per_update, self._max_staleness = groups, max_staleness
    self._key, self._left, self._lent = key, updates, lent
    ready = [
      start.buffer[i : i + grouping.size] for i in range(0, len(start.buffer), grouping.size)
    ]
    self._buffer: collections.deque[Sequence[Trajectory]] = collections.deque(ready)
    kinds = dataclasses.replace(grouping, refills=0)
    supply = Groups(kinds, start.instance, 0, start.open)
    super().__init__(setting, tasks, supply, setting.invalid_cap * groups * grouping.size, starts)
    self._start_at, self._refills = start.instance, grouping.refills
    self._ahead = -len(ready) - len(start.open)  # groups taken beyond those that updates need
    self._done: dict[Member, Trajectory] = {}
    self._fetched_instances = self._fetched_filtered = 0
    self._dropped = 0
    self._version = -1
    # What the trainer asks of the producer: done between two turns, under the lock.
    self._lock = threading.Condition()
    self._orders: collections.deque[tuple[Callable[[], Any], list]] = collections.deque()
    self._closed = False
    self._error: BaseException | None = None
    self._thread = threading.Thread(target=self._produce, name="rollout", daemon=True)

  def __enter__(self) -> "Stream":
    self._thread.start()
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    """Ends the producer; what is under way is let go of, and all devices generate again."""
    with self._lock:
      self._closed = True
      self._lock.notify_all()
    self._environments.ring()
    self._thread.join(_PATIENCE if kind else None)
    if kind is None:  # the engine is this thread's again
      self._take_back()

  # --- the trainer's side ----------------------------------------------------------------------

  def publish(self, params: chex.ArrayTree, version: int) -> None:
    """Gives the producer new weights, whose version is the number of the next update.

    Devices that were lent generate again, under these.

    Raises:
      Whatever ended the producer; see `EpisodeRunner.run`.
      TimeoutError: it hangs.
    """
    self._order(lambda: self._publish(params, version))

  def fetch(self) -> tuple[list[Trajectory], RolloutStats]:
    """Waits for the batch of the update whose weights were published last.

    Devices that are lent are free then, until the next publication.

    Returns:
      Its trajectories, sorted by id; and what was played since the last fetch.
    Raises:
      Whatever ended the producer; see `EpisodeRunner.run`.
      TimeoutError: it hangs.
    """
    while True:
      with self._lock:
        self._lock.wait_for(lambda: self._error or self._enough())
        if self._error:
          raise self._error
      batch = self._order(self._take_batch)
      if batch is not None:
        return batch

  def snapshot(self) -> Snapshot:
    """Where it stands now; raises as `fetch` does."""
    return self._order(self._snapshot)

  def _order(self, work: Callable[[], Any]) -> Any:
    """Runs `work` in the producer's thread between two turns and returns what it gave."""
    answer: list = []
    with self._lock:
      if self._error:
        raise self._error
      self._orders.append((work, answer))
      self._lock.notify_all()
      self._environments.ring()
      heard = self._lock.wait_for(lambda: self._error or answer, _PATIENCE)
      if self._error and not answer:
        raise self._error
      if not heard:
        raise TimeoutError(
          f"the rollout thread did not come round within {_PATIENCE:g} s: a device or a program "
          "hangs; the same command goes on from the last checkpoint"
        )
    return answer[0]

  # --- the producer's side ---------------------------------------------------------------------

  def _produce(self) -> None:
    try:
      while not self._closed:
        with self._lock:
          self._lock.wait_for(lambda: self._orders or self._closed or self._version >= 0)
          while self._orders:
            work, answer = self._orders.popleft()
            answer.append(work())
          self._lock.notify_all()
        if not self._closed:
          self.turn()
    except BaseException as error:  # The trainer raises it.
      with self._lock:
        self._error = error
        self._lock.notify_all()
    finally:
      self.leave()

  def _publish(self, params: chex.ArrayTree, version: int) -> None:
    new = version - self._version if self._version >= 0 else 1 + self._max_staleness
    self._engine.publish(params, self._engine.version + 1, self._key, interrupt=True)
    self._take_back()  # behind it, so that devices get the new weights alone
    self.versions[self._engine.version] = self._version = version
    new = min(new, self._left)
    self._left -= new
    self._ahead += new * self._per_update
    self._more(new * self._refills)

  def _more(self, refills: int = 0) -> None:
    """Begins the groups that are needed and not under way."""
    self._groups.more(max(self._ahead, 0), refills)
    self._ahead = min(self._ahead, 0)

  def finished(self, member: Member, trajectory: Trajectory) -> None:
    self._done[member] = trajectory
    if self._groups.full(member.instance):
      kept = not self._groups.replaced(member.instance)
      group = [self._done.pop(m) for m in self._groups.pop(member.instance)]
      if kept:
        with self._lock:
          self._buffer.append(group)
          self._lock.notify_all()

  def _enough(self) -> bool:
    return len(self._buffer) >= self._per_update

  def _take_batch(self) -> tuple[list[Trajectory], RolloutStats] | None:
    """The first groups that are fresh enough, None where there are too few; drops the others."""
    fresh = [group for group in self._buffer if self._fresh(group)]
    stale = len(self._buffer) - len(fresh)
    self._buffer = collections.deque(fresh)
    self._dropped += stale
    self._ahead += stale
    self._more()
    if not self._enough():
      return None
    self._lend()
    batch = [t for _ in range(self._per_update) for t in self._buffer.popleft()]
    stats = self.count()
    instances, filtered = self._groups.instances, self._groups.filtered
    stats.instances = instances - self._fetched_instances
    stats.filtered = filtered - self._fetched_filtered
    stats.dropped, self._dropped = self._dropped, 0
    self._fetched_instances, self._fetched_filtered = instances, filtered
    return sorted(batch, key=lambda t: t.id), stats

  def _lend(self) -> None:
    """Leaves the lent devices to the trainer."""
    if self._lent:
      assert isinstance(self._engine, EnginePool)
      self._engine.shrink([d for d in self._lent if d in self._engine.serving])
      self._tell_devices()

  def _take_back(self) -> None:
    """Generates on the lent devices, too."""
    if self._lent:
      assert isinstance(self._engine, EnginePool)
      self._engine.expand([d for d in self._lent if d not in self._engine.serving])
      self._tell_devices()

  def _tell_devices(self) -> None:
    assert isinstance(self._engine, EnginePool)
    generating = len(self._engine.serving)
    lent = len(self._engine.devices) - generating
    self._timeline.count("devices", generating=generating, lent=lent)

  def _fresh(self, group: Sequence[Trajectory]) -> bool:
    return min(int(t.versions[0]) for t in group) >= self._version - self._max_staleness

  def _snapshot(self) -> Snapshot:
    return Snapshot(
      self._start_at + self._groups.instances,
      tuple(self._groups.open()),
      tuple(t for group in self._buffer for t in group),
    )
