"""Which members of which groups are played, kept, cancelled and replaced. No threads, no clock.

A group is one task instance, played by `size` members, the samples of group statistics. Two rules
decide over them:

- Redundancy: a group starts `redundancy` members more than it needs; the first `size` that finish
  are kept and the others cancelled. Which they are depends on timing.
- Filtering (the dynamic sampling of DAPO, arXiv:2503.14476): a group whose members all earned the
  same tells group statistics nothing; the next instance is played in its place.

Choice: instances are taken in order and each uniform group takes one more, up to a bound. So those
that were taken are the first n, n the smallest number of which enough are not uniform (or the
bound), whatever the order in which members finish. Where the bound leaves too few, uniform groups
fill the batch, the first ones first.
"""

import collections
import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Grouping:
  """How instances are played.

  Attributes:
    size: members of a group that are kept.
    redundancy: members started beyond them.
    refills: groups a batch that may be replaced because all of their members earned the same.
  """

  size: int = 1
  redundancy: int = 0
  refills: int = 0

  @property
  def members(self) -> int:
    """Members a group may start."""
    return self.size + self.redundancy


@dataclasses.dataclass(frozen=True, order=True)
class Member:
  """One sample of one instance; the pair keys its randomness."""

  instance: int
  sample: int


class Groups:
  """The groups of one batch.

  Args:
    grouping: see there.
    first: number of the first instance.
    count: groups that the batch needs.
    again: instances that were taken before and are played again, before all others.
  Attributes:
    grouping: see there.
    instances: instances taken so far, from `first` on.
  """

  def __init__(self, grouping: Grouping, first: int, count: int, again: Sequence[int] = ()):
    self.grouping, self._first, self._refills = grouping, first, grouping.refills
    self.instances = self._count = 0
    # Extras wait behind everything else, so that they take no place from what is needed for sure.
    self._needed: collections.deque[Member] = collections.deque()
    self._extra: collections.deque[Member] = collections.deque()
    self._running: dict[int, set[Member]] = {}
    self._rewards: dict[int, dict[Member, float]] = {}
    self._replaced: set[int] = set()
    for instance in again:
      self._open(instance)
    self.more(count)

  def more(self, count: int, refills: int = 0) -> None:
    """Takes `count` groups more; `refills` more may be replaced."""
    self._count, self._refills = self._count + count, self._refills + refills
    for _ in range(count):
      self._next()

  def _next(self) -> None:
    """Takes the next instance."""
    self.instances += 1
    self._open(self._first + self.instances - 1)

  def _open(self, instance: int) -> None:
    self._running[instance], self._rewards[instance] = set(), {}
    members = [Member(instance, sample) for sample in range(self.grouping.members)]
    self._needed.extend(members[: self.grouping.size])
    self._extra.extend(members[self.grouping.size :])

  def take(self) -> Member | None:
    """The next member to play, None where none is left to start."""
    line = self._needed or self._extra
    if not line:
      return None
    member = line.popleft()
    self._running[member.instance].add(member)
    return member

  def lose(self, member: Member) -> None:
    """A running member ended without a valid reward; it is the next to be played."""
    self._running[member.instance].remove(member)
    self._needed.appendleft(member)

  def finish(self, member: Member, reward: float) -> list[Member]:
    """A running member earned its reward.

    Returns:
      The members that run in vain now, in order; the caller cancels them.
    """
    instance, size = member.instance, self.grouping.size
    self._running[instance].remove(member)
    self._rewards[instance][member] = reward
    if len(self._rewards[instance]) < size:
      return []
    vain = sorted(self._running[instance])
    self._running[instance].clear()
    for line in (self._needed, self._extra):
      for waiting in [m for m in line if m.instance == instance]:
        line.remove(waiting)
    if self.uniform(instance) and self.filtered < self._refills:
      self._replaced.add(instance)
      self._next()
    return vain

  def uniform(self, instance: int) -> bool:
    """Whether all kept members of a group earned the same."""
    return len(set(self._rewards[instance].values())) == 1

  @property
  def done(self) -> bool:
    """Whether every group taken is full."""
    return all(map(self.full, self._rewards))

  @property
  def filtered(self) -> int:
    """Groups that were replaced."""
    return self.instances - self._count

  def full(self, instance: int) -> bool:
    """Whether a group taken has all of its members."""
    return len(self._rewards[instance]) == self.grouping.size

  def replaced(self, instance: int) -> bool:
    """Whether another group was taken in place of this full one."""
    return instance in self._replaced

  def pop(self, instance: int) -> list[Member]:
    """Takes a full group away; returns its members, in order."""
    del self._running[instance]
    self._replaced.discard(instance)
    return sorted(self._rewards.pop(instance))

  def open(self) -> list[int]:
    """Instances that were taken and not taken away, in order."""
    return sorted(self._rewards)

  def kept(self) -> list[Member]:
    """The batch, once all is done: `count` groups of `size` members, in order."""
    assert self.done
    # False sorts first, and sorting keeps the order of instances within either part.
    chosen = sorted(self._rewards, key=self.uniform)[: self._count]
    return sorted(member for instance in chosen for member in self._rewards[instance])
