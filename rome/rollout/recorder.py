"""The record of one episode while it is played."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rome.agent import Agent, NewRow
from rome.envs.task import Task
from rome.rollout.groups import Member
from rome.trajectory import Reward, Trajectory


@dataclasses.dataclass(frozen=True)
class Episode:
  """One episode to run: its trajectory's id, its task, and what keys its randomness."""

  id: str
  task: Task
  member: Member


class Recorder:
  """Token ids of one episode with their provenance, appended as they happen."""

  def __init__(self) -> None:
    self.tokens: list[int] = []
    self.call_ids: list[int] = []
    self.logps: list[float] = []
    self.versions: list[int] = []
    self.row_starts = [0]
    self.start = 0  # chunks of an expert, which are context here

  @property
  def calls(self) -> int:
    """Replies so far."""
    return len(self.versions)

  @property
  def row(self) -> list[int]:
    """The tokens of the row under way: the context of the next reply."""
    return self.tokens[self.row_starts[-1] :]

  def context(self, context: Sequence[int] | NewRow) -> None:
    """Tokens that no policy sampled: appended, or a new row's."""
    ids = context.ids if isinstance(context, NewRow) else context
    if isinstance(context, NewRow) and self.tokens:
      self.row_starts.append(len(self.tokens))
    self.tokens += ids
    self.call_ids += [-1] * len(ids)
    self.logps += [0.0] * len(ids)

  def reply(self, ids: Sequence[int], logps: Sequence[float], version: int) -> None:
    """The tokens of one LLM call, all sampled by one version of the weights."""
    self.tokens += ids
    self.call_ids += [self.calls] * len(ids)
    self.logps += logps
    self.versions.append(version)

  def finish(
    self, episode: Episode, agent: Agent | None, reward: Reward, reason: str
  ) -> Trajectory:
    """The trajectory; without an agent, of an episode that did not begin."""
    return Trajectory(
      id=episode.id,
      task_id=episode.task.id,
      family=episode.task.family,
      instruction=agent.instruction if agent else "",
      tokens=np.array(self.tokens, np.int32),
      call_ids=np.array(self.call_ids, np.int32),
      logps=np.array(self.logps, np.float32),
      versions=np.array(self.versions, np.int32),
      chunk_rewards=np.zeros(self.calls, np.float32),
      reward=reward,
      end_reason=reason,
      turns=tuple(agent.turns[self.start :]) if agent else (),
      start=self.start,
      row_starts=tuple(self.row_starts),
    )
