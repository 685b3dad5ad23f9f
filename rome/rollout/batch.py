"""One batch of episodes, from its first reset to its last reward."""

from collections.abc import Callable

from rome.envs.task import Task
from rome.rollout.crew import Crew, RolloutStats, Setting, Starts
from rome.rollout.groups import Grouping, Groups, Member
from rome.trajectory import Trajectory


class Batch(Crew):
  """One call of `EpisodeRunner.run`.

  Args:
    setting: see there.
    version: number of the weights that the engine was given last.
    tasks, first, count, grouping, starts: as for `EpisodeRunner.run`.
  """

  def __init__(
    self,
    setting: Setting,
    version: int,
    tasks: Callable[[int], Task],
    first: int,
    count: int,
    grouping: Grouping,
    starts: Starts,
  ):
    most_invalid = setting.invalid_cap * count * grouping.size
    super().__init__(setting, tasks, Groups(grouping, first, count), most_invalid, starts)
    self.versions = {self._engine.version: version}
    self._done: dict[Member, Trajectory] = {}

  def play(self) -> tuple[list[Trajectory], RolloutStats]:
    """Plays until all is done.

    Returns:
      The trajectories, sorted by id, and what they took.
    """
    try:
      while not self._groups.done:
        self.turn()
    finally:  # Where it ends well, no lane is left.
      self.leave()
    stats = self.count()
    stats.instances, stats.filtered = self._groups.instances, self._groups.filtered
    return sorted((self._done[m] for m in self._groups.kept()), key=lambda t: t.id), stats

  def finished(self, member: Member, trajectory: Trajectory) -> None:
    self._done[member] = trajectory
