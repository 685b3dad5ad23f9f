"""Environments and agents that users bring by import path, "package.module:name".

    tasks.env      make_env(task, *, pool, judges, max_turns, command_timeout, max_observation)
    agent.factory  make_agent(env, tokenizer, *, system, max_turns)

They are called as `TerminalEnv` and `Agent` are, which are the defaults, so a subclass of either is
one. An environment is a `gymnasium.Env` of strings. A path that cannot be used is one `CustomError`
when a run starts; what a user's code raises later keeps its traceback, but for `SandboxError` and
`TimeoutError`: they make the episode invalid, and it is played again. Rewards and losses:
`rome.rollout.custom`.
"""

import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from rome.agent.agent import Agent

_OF_AGENTS = (
  *("env", "begin", "act", "resume", "stop", "instruction", "turns", "reward", "end_reason"),
)


class CustomError(ValueError):
  """An import path or what it names cannot be used; the message names the setting."""


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


def check_agent(agent: Any) -> Agent:
  """The agent, if it has all that a rollout asks of one; else raises CustomError."""
  missing = [name for name in _OF_AGENTS if not hasattr(agent, name)]
  if missing:
    raise CustomError(
      f"config.agent.factory made a {type(agent).__name__} without {', '.join(missing)}; "
      "see rome.agent.Agent"
    )
  return agent
