"""The environments' side of a run.

A pool of sandboxes, and an agent in one of them for each episode; or environments and agents of the
user's own (`rome.agent.custom`), with sandboxes or without. A host that plays episodes needs no
more than this (`rome.agent.worker`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import gymnasium

from rome import envs
from rome.agent import custom
from rome.agent.agent import Agent
from rome.envs import sandbox
from rome.envs.task import Task
from rome.envs.terminal import MIN_OBSERVATION
from rome.text import ByteTokenizer

TERMINAL = "rome.envs.terminal:TerminalEnv"
NO_BACKEND = "none"
MANAGED, NATIVE = "managed", "native"  # agent.mode
BACKENDS = ("auto", *sandbox.BACKENDS, NO_BACKEND)
_JUDGES = 4  # sandboxes in which tests run


@dataclasses.dataclass(frozen=True)
class SandboxConfig:
  """The sandboxes that episodes run in.

  Attributes:
    backend: "auto", "podman", "bubblewrap" or "process"; "none" where an own `tasks.env` needs no
      sandboxes.
    accept_no_isolation: must be set for "process".
    image: container image; "" is the base image that the project builds.
    reuse: episodes that one sandbox serves, emptied in between; 1 gives each its own.
    memory_mb: MiB of memory of one sandbox.
    cpus: share of processors of one sandbox.
    pids: processes of one sandbox.
    disk_mb: MiB of each writable place.
    command_timeout: seconds a command may take; with `agent.scaffold` those of one reply together.
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
    factory: import path of what makes agents, see `rome.agent.custom`.
    scaffold: file of settings of `rome agent`; then its loop, with all of its tools and skills,
      plays the episodes (`rome.agent.managed`).
    mode: "managed", where the run builds the context; or "native", where a foreign agent does and
      calls the policy over HTTP (`rome.rollout.native`, settings `native`).
  """

  system: str = ""
  max_turns: int = 6
  max_reply: int = 48
  context: int = 160
  max_observation: int = 64
  factory: str = "rome.agent:Agent"
  scaffold: str = ""
  mode: str = MANAGED

  def __post_init__(self) -> None:
    if self.mode not in (MANAGED, NATIVE):
      raise ValueError(f"agent.mode must be {MANAGED!r} or {NATIVE!r}, got {self.mode!r}")
    for name in ("max_turns", "max_reply"):
      if getattr(self, name) < 1:
        raise ValueError(f"agent.{name} must be at least 1, got {getattr(self, name)}")
    if self.max_observation < MIN_OBSERVATION:
      raise ValueError(
        f"agent.max_observation must be at least {MIN_OBSERVATION}, got {self.max_observation}"
      )
    if self.scaffold and (self.system or self.factory != AgentConfig.factory):
      name = "system" if self.system else "factory"
      raise ValueError(f"agent.{name} is not read with agent.scaffold={self.scaffold!r}: drop one")
    if self.context < 2 * self.max_reply:
      raise ValueError(
        f"agent.context must be at least twice agent.max_reply={self.max_reply}, got {self.context}"
      )


def policy_tokenizer() -> ByteTokenizer:
  """The tokenizer of the policies that are trained here."""
  return ByteTokenizer()


def make_factory(
  config: AgentConfig, command_timeout: float = SandboxConfig.command_timeout
) -> Callable[..., Agent]:
  """What makes agents.

  Args:
    config: see there.
    command_timeout: seconds that a reply's commands may take, where the agent runs them itself.
  Raises:
    CustomError: an import path or the scaffold's file cannot be used.
  """
  if not config.scaffold:
    return custom.load_agent(config.factory)
  from rome.agent import managed  # with the libraries of the extra [agent]

  try:
    return managed.scaffold(
      config.scaffold, config.max_reply, config.context, config.max_turns, command_timeout
    )
  except ValueError as error:
    raise custom.CustomError(f"config.{error}") from None


def demonstration(
  config: AgentConfig, tokenizer: ByteTokenizer, solution: Sequence[str]
) -> list[list[int]]:
  """Replies, as token ids, with which an agent carries out a task's solution."""
  if config.scaffold:
    from rome.agent import managed

    return managed.demonstration(tokenizer, solution)
  t = tokenizer
  calls = [*(f"sh {command}" for command in solution), "submit"]
  return [[t.call, *t.encode(call), t.end] for call in calls]


class World:
  """A pool of sandboxes and the agents in them. A context manager.

  Args:
    config: the sandboxes.
    agent: the agents.
    size: sandboxes at once.
    env: import path of what makes environments.
    network: what sandboxes may reach; None for nothing but their own loopback.
  Attributes:
    backend: the backend that "auto" came to.
    pool: the sandboxes, None for the backend "none".
    judges: further ones, in which tests run, or None.
    tokenizer: the policy's.
    context: tokens an episode may take.
  Raises:
    SandboxError: no backend or image can be used; the message says what to install or change.
    CustomError: an import path cannot be used.
  """

  def __init__(
    self,
    config: SandboxConfig,
    agent: AgentConfig,
    size: int,
    env: str = TERMINAL,
    network: envs.NetworkPolicy | None = None,
  ):
    self._sandbox, self._agent, self._network = config, agent, network
    self._make_env = custom.load_env(env)
    self._make_agent = make_factory(agent, config.command_timeout)
    self.tokenizer = policy_tokenizer()
    self.context = agent.context
    self.backend = config.backend
    self.pool: envs.SandboxPool | None = None
    self.judges: envs.SandboxPool | None = None
    if self.backend != NO_BACKEND:
      self._start(config, size)

  def _start(self, config: SandboxConfig, size: int) -> None:
    def make(network: envs.NetworkPolicy | None = None) -> sandbox.Sandbox:
      return envs.make_sandbox(
        config.image or None,
        config.backend,
        limits=config.limits(),
        accept_no_isolation=config.accept_no_isolation,
        network=network,
      )

    with make() as probe:  # the first error is told once, and not from inside a thread of the pool
      self.backend = probe.backend
    self.pool = envs.SandboxPool(lambda: make(self._network), size, config.reuse)
    self.judges = envs.SandboxPool(make, min(size, _JUDGES), config.reuse)

  def environment(self, task: Task) -> gymnasium.Env:
    """A fresh environment for one episode of `task`; it takes a sandbox at its reset.

    Raises:
      CustomError: the user's factory made something else.
    """
    env = self._make_env(
      task,
      pool=self.pool,
      judges=self.judges,
      max_turns=self._agent.max_turns,
      command_timeout=self._sandbox.command_timeout,
      max_observation=self._agent.max_observation,
    )
    if not isinstance(env, gymnasium.Env):
      raise custom.CustomError(
        f"config.tasks.env made a {type(env).__name__}, which is no gymnasium.Env; subclass it"
      )
    return env

  def agent(self, task: Task) -> Agent:
    """A fresh agent for one episode of `task`, with an environment of its own.

    Raises:
      CustomError: the user's factories made something else.
    """
    env = self.environment(task)
    agent = self._make_agent(
      env, self.tokenizer, system=self._agent.system, max_turns=self._agent.max_turns
    )
    return custom.check_agent(agent)

  def demonstration(self, solution: Sequence[str]) -> list[list[int]]:
    """Replies, as token ids, that carry out a task's solution."""
    return demonstration(self._agent, self.tokenizer, solution)

  def close(self) -> None:
    for pool in (self.pool, self.judges):
      if pool is not None:
        pool.close()

  def __enter__(self) -> "World":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
