"""Runs agents in environments against the engine and returns finished trajectories.

Environments act in threads while the engine generates for the others: a slow one delays its own
trajectory alone. Every trajectory is a member of a group (`rome.rollout.groups`), and instance and
sample key its randomness. What the engine says follows from context and key, so results do not
depend on who finishes first, unless redundancy lets the first finishers win.

An episode whose infrastructure failed, or whose environment fell silent, is Invalid; it is
relaunched at once from the same initial state, so that the batch stays full, until failures pass a
cap. A reset that fails is tried again after a while.

`EpisodeRunner.run` plays one batch; `EpisodeRunner.stream` goes on while training does.

Members may start inside expert trajectories (`rome.rollout.starts`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax

from rome import models
from rome.agent import Agent
from rome.envs.task import Task
from rome.rollout.batch import Batch
from rome.rollout.crew import RolloutStats, Setting, Starts
from rome.rollout.engine import AnyEngine
from rome.rollout.groups import Grouping, Member
from rome.rollout.lanes import Environments, Patience
from rome.rollout.stream import Snapshot, Stream
from rome.rollout.timeline import NO_TIMELINE, Timeline
from rome.trajectory import Trajectory

ONE = Grouping()  # each instance is played once
PATIENCE = Patience()


def initial(member: Member) -> None:
  """Everybody begins at the initial state."""


class EpisodeRunner:
  """Runs batches of episodes.

  Args:
    engine: one, or one a device; as many episodes run at once as it has slots.
    make_agent: an agent with its own environment for a task; called in a thread.
    sampling: the distribution that replies are drawn from.
    max_reply: sampled tokens a reply.
    invalid_cap: share of the batch that may fail for reasons of infrastructure.
    patience: how long environments are waited for.
    timeline: where it is told what happens when.
    max_rows: rows that an agent's rewriting may cut a trajectory into. Beyond it an episode ends as
      one whose context is full, since a batch has all of them in one micro-batch.
  """

  def __init__(
    self,
    engine: AnyEngine,
    make_agent: Callable[[Task], Agent],
    sampling: models.Sampling,
    *,
    max_reply: int,
    invalid_cap: float,
    patience: Patience = PATIENCE,
    timeline: Timeline = NO_TIMELINE,
    max_rows: float = math.inf,
  ):
    self.engine, self._environments = engine, Environments(patience)
    self._setting = Setting(
      engine,
      make_agent,
      sampling,
      max_reply,
      invalid_cap,
      self._environments,
      timeline,
      max_rows=max_rows,
    )

  def close(self) -> None:
    self._environments.close()

  def run(
    self,
    params: chex.ArrayTree,
    key: chex.PRNGKey,
    version: int,
    tasks: Callable[[int], Task],
    first: int,
    count: int,
    grouping: Grouping = ONE,
    starts: Starts = initial,
  ) -> tuple[list[Trajectory], RolloutStats]:
    """Plays `count` groups.

    Args:
      params: weights to sample under.
      key: base key; the key of a token is fold_in(key, (instance, sample and chunk, token)).
      version: version number of `params`.
      tasks: the task of an instance, by its number.
      first: number of the first instance; groups that are replaced take those behind.
      count: groups.
      grouping: members of a group, and which groups are replaced.
      starts: where a member begins, None for the initial state.
    Returns:
      The trajectories, `grouping.size` a group, all with a valid reward, sorted by id; and what
      they took.
    Raises:
      TooManyInvalid: more than the cap failed.
      TooManyAbandoned: too many environments hang although their sandboxes were killed.
      TaskError: a task's prompt leaves no room for a reply.
      SandboxError: no sandbox starts any more.
    """
    # The engine numbers what it is given; the same weights may come twice, with another key.
    self.engine.publish(params, self.engine.version + 1, key)
    return self._batch(version, tasks, first, count, grouping, starts).play()

  def _batch(self, *episodes: Any) -> Batch:
    """A batch of `run`, not yet played; subclasses may play otherwise."""
    return Batch(self._setting, *episodes)

  def stream(
    self,
    key: chex.PRNGKey,
    tasks: Callable[[int], Task],
    start: Snapshot,
    grouping: Grouping,
    groups: int,
    max_staleness: int,
    updates: int,
    starts: Starts = initial,
    lent: Sequence[jax.Device] = (),
  ) -> Stream:
    """A producer of batches that goes on while training does; arguments as for `Stream`.

    The engine is the stream's alone until it is closed.
    """
    return Stream(
      self._setting, key, tasks, start, grouping, groups, max_staleness, updates, starts, lent
    )
