"""The environments' side of a run.

A pool of sandboxes, and an agent in one of them for each episode.
"""

import dataclasses
import math

from rome import envs
from rome.agent import Agent
from rome.envs import sandbox
from rome.envs.task import Task
from rome.envs.terminal import MIN_OBSERVATION, TerminalEnv
from rome.rollout.lanes import Patience
from rome.text import ByteTokenizer

BACKENDS = ("auto", *sandbox.BACKENDS)
_JUDGES = 4  # sandboxes in which tests run


@dataclasses.dataclass(frozen=True)
class SandboxConfig:
  """The sandboxes that episodes run in.

  Attributes:
    backend: "auto", "podman", "bubblewrap" or "process".
    accept_no_isolation: must be set for "process".
    image: container image; "" is the base image that the project builds.
    reuse: episodes that one sandbox serves, emptied in between; 1 gives each its own.
    memory_mb: MiB of memory of one sandbox.
    cpus: share of processors of one sandbox.
    pids: processes of one sandbox.
    disk_mb: MiB of each writable place.
    command_timeout: seconds a command may take.
    deadline: seconds an action may take, the tests included; an environment that is silent for
      longer is given up and its episode played again.
    reset_deadline: likewise for an episode to begin, the wait for a free sandbox included.
    close_deadline: likewise for an environment to close.
    reset_tries: resets an episode may take, ever further apart, before it counts as failed.
    max_abandoned: threads that may hang in environments given up before the run stops.
    invalid_cap: share of a batch's episodes that may fail for reasons of infrastructure before the
      run stops.
  """

  backend: str = "auto"
  accept_no_isolation: bool = False
  image: str = ""
  reuse: int = 256
  memory_mb: int = 256
  cpus: float = 1.0
  pids: int = 64
  disk_mb: int = 16
  command_timeout: float = 10.0
  deadline: float = 120.0
  reset_deadline: float = 120.0
  close_deadline: float = 30.0
  reset_tries: int = 5
  max_abandoned: int = 16
  invalid_cap: float = 0.5

  def __post_init__(self) -> None:
    if self.backend not in BACKENDS:
      raise ValueError(
        f"sandbox.backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}"
      )
    for name, least in (("reuse", 1), ("reset_tries", 1), ("max_abandoned", 0)):
      if getattr(self, name) < least:
        raise ValueError(f"sandbox.{name} must be at least {least}, got {getattr(self, name)}")
    for name in ("reset_deadline", "close_deadline"):
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(f"sandbox.{name} must be above 0 and finite, got {getattr(self, name):g}")
    if not 0 <= self.invalid_cap < 1:
      raise ValueError(f"sandbox.invalid_cap must be in [0, 1), got {self.invalid_cap}")
    if not 0 < self.command_timeout < self.deadline:
      raise ValueError(
        f"sandbox.command_timeout must be above 0 and below sandbox.deadline={self.deadline:g}, "
        f"got {self.command_timeout:g}"
      )
    if self.backend == "process" and not self.accept_no_isolation:
      raise ValueError(
        "sandbox.backend=process isolates nothing: run with --sandbox=process "
        "--i_accept_no_isolation"
      )
    self.limits()

  def patience(self) -> Patience:
    return Patience(
      reset=self.reset_deadline,
      step=self.deadline,
      close=self.close_deadline,
      tries=self.reset_tries,
      max_abandoned=self.max_abandoned,
    )

  def limits(self) -> envs.Limits:
    return envs.Limits(
      memory_mb=self.memory_mb, cpus=self.cpus, pids=self.pids, disk_mb=self.disk_mb
    )


@dataclasses.dataclass(frozen=True)
class AgentConfig:
  """The agent and its context.

  Attributes:
    system: system prompt, "" for none.
    max_turns: replies an episode may take.
    max_reply: tokens a reply may take.
    context: tokens an episode may take.
    max_observation: characters of a command's output that the policy sees.
  """

  system: str = ""
  max_turns: int = 6
  max_reply: int = 48
  context: int = 160
  max_observation: int = 64

  def __post_init__(self) -> None:
    for name in ("max_turns", "max_reply"):
      if getattr(self, name) < 1:
        raise ValueError(f"agent.{name} must be at least 1, got {getattr(self, name)}")
    if self.max_observation < MIN_OBSERVATION:
      raise ValueError(
        f"agent.max_observation must be at least {MIN_OBSERVATION}, got {self.max_observation}"
      )
    if self.context < 2 * self.max_reply:
      raise ValueError(
        f"agent.context must be at least twice agent.max_reply={self.max_reply}, got {self.context}"
      )


def policy_tokenizer() -> ByteTokenizer:
  """The tokenizer of the policies that are trained here."""
  return ByteTokenizer()


class World:
  """A pool of sandboxes and the agents in them. A context manager.

  Args:
    config: the sandboxes.
    agent: the agents.
    size: sandboxes at once.
  Attributes:
    backend: the backend that "auto" came to.
    pool: the sandboxes.
    judges: further ones, in which tests run.
    tokenizer: the policy's.
    context: tokens an episode may take.
  Raises:
    SandboxError: no backend or image can be used; the message says what to install or change.
  """

  def __init__(self, config: SandboxConfig, agent: AgentConfig, size: int):
    self._sandbox, self._agent = config, agent
    self.tokenizer = policy_tokenizer()
    self.context = agent.context

    def make() -> sandbox.Sandbox:
      return envs.make_sandbox(
        config.image or None,
        config.backend,
        limits=config.limits(),
        accept_no_isolation=config.accept_no_isolation,
      )

    with make() as probe:  # the first error is told once, and not from inside a thread of the pool
      self.backend = probe.backend
    self.pool = envs.SandboxPool(make, size, config.reuse)
    self.judges = envs.SandboxPool(make, min(size, _JUDGES), config.reuse)

  def agent(self, task: Task) -> Agent:
    """A fresh agent for one episode of `task`; it takes a sandbox when it begins."""
    env = TerminalEnv(
      task,
      pool=self.pool,
      judges=self.judges,
      max_turns=self._agent.max_turns,
      command_timeout=self._sandbox.command_timeout,
      max_observation=self._agent.max_observation,
    )
    return Agent(env, self.tokenizer, self._agent.system, self._agent.max_turns)

  def close(self) -> None:
    self.pool.close()
    self.judges.close()

  def __enter__(self) -> "World":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
