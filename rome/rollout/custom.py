"""Rewards and losses that users bring by import path, "package.module:name".

    reward         reward(trajectory) -> float or rome.trajectory.Invalid
    estimator      estimator(logp_BxT, batch, config, totals, entropy_BxT) -> (loss, metrics)

Environments and agents: `rome.agent.custom`. A path that cannot be used is one `CustomError` when a
run starts; what a user's function raises later keeps its traceback.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from rome.agent import Agent, NewRow
from rome.agent.custom import CustomError, check_agent, load, load_agent, load_env
from rome.agent.world import make_factory
from rome.envs.sandbox import SandboxError
from rome.envs.task import Task
from rome.rollout.groups import Member
from rome.rollout.recorder import Episode, Recorder
from rome.trajectory import Invalid, Trajectory, Turn, Valid

__all__ = [
  "CustomError",
  "NoReward",
  "RewardFn",
  "Rewarded",
  "check_agent",
  "load",
  "load_agent",
  "load_env",
  "load_reward",
  "make_factory",
]
RewardFn = Callable[[Trajectory], "float | Invalid"]


class NoReward(SandboxError):
  """A custom reward is `Invalid`: the episode does not count and is played again."""


def load_reward(path: str) -> RewardFn:
  """A reward function (`reward`)."""
  return load(path, "reward", "trajectory")


class Rewarded:
  """An agent whose finished episodes are rewarded by a user's function.

  The function runs where the agent acts, in the thread of its episode, so that it may be slow:
  `sandbox.deadline` bounds it together with the last action. It gets the trajectory with the
  environment's own reward, to replace or to add to; log-probs are NaN and versions 0, as neither is
  its business. An episode that is stopped from outside, its context full, earns 0 and is not asked.

  Args:
    agent: the agent.
    task: what it plays.
    reward: the function.
  """

  def __init__(self, agent: Agent, task: Task, reward: RewardFn):
    self._agent, self._task, self._judge = agent, task, reward
    self._record = Recorder()
    self.reward = 0.0

  def __getattr__(self, name: str) -> Any:
    return getattr(self._agent, name)

  def begin(self) -> list[int]:
    ids = self._agent.begin()
    self._record.context(ids)
    return ids

  def resume(self, context: Sequence[int], turns: Sequence[Turn]) -> None:
    self._agent.resume(context, turns)
    self._record = Recorder()
    self._record.context(context)
    self._record.start = len(turns)

  def act(self, reply: Sequence[int]) -> list[int] | NewRow | None:
    """As `Agent.act`; raises NoReward for an Invalid and CustomError for what is no reward."""
    self._record.reply(reply, [math.nan] * len(reply), version=0)
    ids = self._agent.act(reply)
    if ids is None:
      self.reward = self._value()
    else:
      self._record.context(ids)
    return ids

  def _value(self) -> float:
    episode = Episode(self._task.id, self._task, Member(0, 0))
    own = Valid(float(self._agent.reward))
    value: Any = self._judge(self._record.finish(episode, self._agent, own, self._agent.end_reason))
    if isinstance(value, Invalid):
      raise NoReward(value.reason)
    number = float(value) if isinstance(value, numbers.Real) else math.nan
    if not math.isfinite(number):
      raise CustomError(
        f"config.reward gave {value!r} for {self._task.id}; it must be a finite number or "
        "rome.trajectory.Invalid"
      )
    return number
