"""The process of a foreign agent in the sandbox of its episode: start, watch, end, score.

The sandbox has no network but its loopback, on which one port leads to the model proxy
(`network_policy`): the endpoint is the agent's only way out. How an episode ends:

    the agent exits with 0                 the tests run             "submitted"
    it has made all the calls it may       the tests run             "max_turns"
    it has rewritten its context as often  the tests run             "max_rows"
    it exits with another status N         earns nothing             "agent_exit_N"
    ... after a call with too long a context                         "context_full"
    it is not done in time                 earns nothing, killed     "agent_deadline"
    it makes no call for a while           earns nothing, killed     "agent_silent"
    it ends before its first call          no reward: `AgentFailed`, as its installation is broken
    the sandbox is lost                    no reward: `SandboxLost`
    native.endpoint fails                  no reward                 "endpoint_failed"

So what the policy did wrong is a failure that it learns from, and what it could not help is not.
"""

import time

import gymnasium

from rome.envs.network.policy import NetworkPolicy
from rome.envs.sandbox import Sandbox, SandboxError, Session
from rome.envs.terminal import SUBMIT
from rome.rollout.native.config import NativeConfig
from rome.rollout.native.sessions import Session as Calls

_HOME = "/tmp/home"  # not the work directory, where an agent's own files are in the way
_INSTRUCTION, _INSTALL, _COMMAND = (
  f"{_HOME}/{name}" for name in ("instruction.md", "install.sh", "agent.sh")
)
_LONGEST_VARIABLE = 100_000  # bytes; the kernel takes 131,072 for one
_POLL = 2.0  # seconds between two looks at the deadlines
_TAIL = 600  # characters of the agent's output in a message


class AgentFailed(SandboxError):
  """The agent ended before its first call."""


def network_policy(config: NativeConfig, address: tuple[str, int]) -> NetworkPolicy:
  """What the sandboxes of native episodes may reach: the proxy at `address`, and nothing else."""
  longest = config.deadline + 60.0  # a connection that waits for the policy is silent
  return NetworkPolicy(forward={config.port: address}, idle_timeout=longest, total_timeout=longest)


class NativeAgent:
  """One episode of a foreign agent.

  Args:
    env: a `rome/Terminal-v0` environment, or another one with a `sandbox` and the action "submit".
    config: the agent.
  Attributes:
    env: as given.
    instruction, reward, end_reason: of the episode, as far as it has come.
  """

  def __init__(self, env: gymnasium.Env, config: NativeConfig):
    self.env, self._config = env, config
    self.instruction, self.reward, self.end_reason = "", 0.0, ""
    self._process: Session | None = None
    self._calls: Calls | None = None
    self._began = 0.0
    self._said = ""

  @property
  def sandbox(self) -> Sandbox:
    """The sandbox of the episode. Raises SandboxError where the environment has none."""
    sandbox = getattr(self.env.unwrapped, "sandbox", None)
    if sandbox is None:
      raise SandboxError(
        "the environment of a native episode has no sandbox for the agent: give tasks.env one with "
        "an attribute `sandbox`, or use agent.mode='managed'"
      )
    return sandbox

  def begin(self, calls: Calls) -> None:
    """Resets the environment and starts the agent.

    Args:
      calls: the session under which it calls the proxy.
    Raises:
      SandboxError: the infrastructure failed.
    """
    self._calls = calls
    self.instruction, _ = self.env.reset()
    sandbox = self.sandbox
    sandbox.write_file(_INSTRUCTION, self.instruction.encode())
    sandbox.write_file(_COMMAND, self._config.command.encode())
    self._process = sandbox.session("agent", env=self._variables(calls.key))
    if self._config.install:
      sandbox.write_file(_INSTALL, self._config.install.encode())
      done = self._process.run(f"bash {_INSTALL}", self._config.silence)
      if done.exit_code != 0:
        raise AgentFailed(f"native.install ends with {done.exit_code}: {done.output[-_TAIL:]}")
    self._process.start(f"bash {_COMMAND}", self._config.deadline + 60.0)
    self._began = time.monotonic()
    calls.listen()  # a sandbox and the installation may have taken long

  def _variables(self, key: str) -> dict[str, str]:
    url = f"http://127.0.0.1:{self._config.port}/v1"
    found = {
      "HOME": _HOME,
      "OPENAI_BASE_URL": url,
      "OPENAI_API_BASE": url,
      "OPENAI_API_KEY": key,
      "OPENAI_MODEL": self._config.model,
      "ROME_INSTRUCTION_FILE": _INSTRUCTION,
    }
    if len(self.instruction.encode()) <= _LONGEST_VARIABLE and "\0" not in self.instruction:
      found["ROME_INSTRUCTION"] = self.instruction
    return found

  def watch(self) -> bool:
    """Looks after the agent for a while; whether it has ended.

    Raises:
      AgentFailed: it ended before its first call.
      SandboxLost: the sandbox died.
    """
    assert self._process is not None and self._calls is not None
    end = time.monotonic() + _POLL
    while (left := end - time.monotonic()) > 0:
      progress = self._process.poll(left)
      self._said = (self._said + progress.output)[-_TAIL:]
      if progress.result is not None:
        self._exited(progress.result.exit_code)
        return True
    reason = self._calls.stopped
    if not reason and time.monotonic() - self._began > self._config.deadline:
      reason = "agent_deadline"
    if not reason and self._calls.silence() > self._config.silence:
      reason = "agent_silent"
    if not reason:
      return False
    self._process.stop()
    self._check_called(reason)
    self.end_reason = reason
    return True

  def _exited(self, status: int | None) -> None:
    assert self._calls is not None
    self._check_called(f"status {status}")
    if self._calls.stopped:
      self.end_reason = self._calls.stopped
    elif status == 0:
      self.end_reason = "submitted"
    else:
      self.end_reason = "context_full" if self._calls.overflowed else f"agent_exit_{status}"

  def _check_called(self, how: str) -> None:
    assert self._calls is not None
    if not self._calls.record.calls:
      refused = ", its context was too long" if self._calls.overflowed else ""
      raise AgentFailed(
        f"the agent ended ({how}) before its first LLM call{refused}: see native.command; "
        f"it said: {self._said.strip() or 'nothing'}"
      )

  def score(self) -> None:
    """Ends the calls, and runs the tests where the way it ended has them.

    Raises:
      SandboxError: the infrastructure failed.
    """
    assert self._calls is not None
    self._calls.end()
    if self.end_reason in ("submitted", "max_turns", "max_rows"):
      _, reward, _, _, _ = self.env.step(SUBMIT)
      self.reward = float(reward)
    if not self._calls.settle(self._config.silence):
      raise SandboxError(f"a call was not answered within {self._config.silence:g} s")
