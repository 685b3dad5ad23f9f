"""What users bring by import path, "package.module:name": environments, agents, rewards, losses.

    tasks.env      make_env(task, *, pool, judges, max_turns, command_timeout, max_observation)
    agent.factory  make_agent(env, tokenizer, *, system, max_turns)
    reward         reward(trajectory) -> float or rome.trajectory.Invalid
    estimator      estimator(logp_BxT, batch, config, totals, entropy_BxT) -> (loss, metrics)

The first two are called as `TerminalEnv` and `Agent` are, which are the defaults, so a subclass of
either is one. An environment is a `gymnasium.Env` of strings. A path that cannot be used is one
`CustomError` when a run starts; what a user's function raises later keeps its traceback, but for
`SandboxError` and `TimeoutError`: they make the episode invalid, and it is played again.
"""

import inspect
import math
import numbers
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

from rome.agent import Agent
from rome.envs.sandbox import SandboxError
from rome.envs.task import Task
from rome.rollout.groups import Member
from rome.rollout.recorder import Episode, Recorder
from rome.trajectory import Invalid, Trajectory, Turn, Valid

RewardFn = Callable[[Trajectory], "float | Invalid"]
_OF_AGENTS = (
  "env",
  "begin",
  "act",
  "resume",
  "stop",
  "instruction",
  "turns",
  "reward",
  "end_reason",
)


class CustomError(ValueError):
  """An import path or what it names cannot be used; the message names the setting."""


class NoReward(SandboxError):
  """A custom reward is `Invalid`: the episode does not count and is played again."""


def load(path: str, setting: str, *args: str, **kwargs: str) -> Callable[..., Any]:
  """The function or class at `path`.

  Args:
    path: "package.module:name".
    setting: the setting that holds it, for messages.
    args, kwargs: names of what it will be called with.
  Raises:
    CustomError: it cannot be imported, cannot be called, or takes other arguments.
  """
  where = f"config.{setting}={path!r}"
  module, colon, name = path.partition(":")
  if not (module and colon and name):
    raise CustomError(f'{where} must be an import path "package.module:name"')
  try:
    found = pkgutil.resolve_name(path)
  except Exception as error:  # whatever the user's module raises
    words = " ".join(f"{type(error).__name__}: {error}".split())
    raise CustomError(
      f"{where} cannot be imported ({words}); mend the path, or put its directory on PYTHONPATH"
    ) from error
  if not callable(found):
    raise CustomError(f"{where} is {type(found).__name__}, which cannot be called")
  try:
    inspect.signature(found).bind(*args, **kwargs)
  except TypeError as error:
    wanted = ", ".join([*args, *(f"{key}=" for key in kwargs)])
    raise CustomError(f"{where} does not take what it is given, ({wanted}): {error}") from None
  except ValueError:  # one in C, without a signature to look at
    pass
  return found


def load_env(path: str) -> Callable[..., Any]:
  """What makes environments (`tasks.env`)."""
  names = ("pool", "judges", "max_turns", "command_timeout", "max_observation")
  return load(path, "tasks.env", "task", **dict.fromkeys(names, ""))


def load_agent(path: str) -> Callable[..., Agent]:
  """What makes agents (`agent.factory`)."""
  return load(path, "agent.factory", "env", "tokenizer", system="", max_turns="")


def load_reward(path: str) -> RewardFn:
  """A reward function (`reward`)."""
  return load(path, "reward", "trajectory")


def check_agent(agent: Any) -> Agent:
  """The agent, if it has all that a rollout asks of one; else raises CustomError."""
  missing = [name for name in _OF_AGENTS if not hasattr(agent, name)]
  if missing:
    raise CustomError(
      f"config.agent.factory made a {type(agent).__name__} without {', '.join(missing)}; "
      "see rome.agent.Agent"
    )
  return agent


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

  def act(self, reply: Sequence[int]) -> list[int] | None:
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
