"""Episodes on another host: environment and agent there, the model elsewhere.

`Worker` plays the episodes of one host for `rome.rollout.workers`: it has a `World` of its own and
keeps the agents that are under way. What crosses is tokens and text. It loads no jax.
"""

import dataclasses
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

from rome.agent.agent import Agent, NewRow
from rome.agent.world import AgentConfig, SandboxConfig, World
from rome.envs.sandbox import SandboxError
from rome.envs.task import Task
from rome.trajectory import Turn


@dataclasses.dataclass(frozen=True)
class Answer:
  """What an agent gave, and what it knows since the last answer.

  Attributes:
    ids: token ids to append, a new row, or None when the episode is over; see `Agent.act`.
    instruction, reward, end_reason: as of `Agent`.
    turns: those since the last answer.
  """

  ids: list[int] | NewRow | None
  instruction: str
  reward: float
  end_reason: str
  turns: tuple[Turn, ...]


class Worker:
  """Plays the episodes of one host. A Ray actor with many threads.

  Args:
    sandbox, agent, size, env: as for `World`.
  """

  def __init__(self, sandbox: SandboxConfig, agent: AgentConfig, size: int, env: str):
    self._world = World(sandbox, agent, size, env)
    self._agents: dict[int, Agent] = {}
    self._told: dict[int, int] = {}  # turns of an agent that have been told
    self._lock = threading.Lock()

  def hello(self) -> tuple[str, int, bool]:
    """The backend of its sandboxes, its process, whether it has loaded jax."""
    return self._world.backend, os.getpid(), "jax" in sys.modules

  def begin(self, episode: int, task: Task) -> "Answer | BaseException":
    """Begins an episode under a number of the caller's; an error is given, not raised."""
    agent = self._world.agent(task)
    with self._lock:
      self._agents[episode], self._told[episode] = agent, 0
    return self._answer(episode, agent.begin)

  def act(self, episode: int, reply: Sequence[int]) -> "Answer | BaseException":
    """Carries out a reply, as `Agent.act`; an error is given, not raised."""
    agent = self._agents[episode]
    return self._answer(episode, lambda: agent.act(reply))

  def _answer(self, episode: int, work: Any) -> "Answer | BaseException":
    agent = self._agents[episode]
    try:
      ids = work()
    except TimeoutError as error:
      return TimeoutError(str(error))
    except SandboxError as error:  # its class may want other arguments than its text
      return SandboxError(str(error))
    told = self._told[episode]
    self._told[episode] = len(agent.turns)
    return Answer(
      ids, agent.instruction, float(agent.reward), agent.end_reason, tuple(agent.turns[told:])
    )

  def kill(self, episode: int) -> None:
    """Ends the sandbox under an episode whose call hangs."""
    agent = self._agents.get(episode)
    sandbox: Any = getattr(agent.env.unwrapped, "sandbox", None) if agent else None
    if sandbox is not None:
      sandbox.close()

  def end(self, episode: int) -> None:
    """Closes an episode's environment, which gives its sandbox back."""
    with self._lock:
      agent = self._agents.pop(episode, None)
      self._told.pop(episode, None)
    if agent is not None:
      agent.env.close()

  def close(self) -> None:
    """Ends everything."""
    self._world.close()
