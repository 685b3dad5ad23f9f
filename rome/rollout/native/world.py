"""The environments' side of a foreign agent: sandboxes that reach the model proxy alone."""

import functools
from collections.abc import Callable
from typing import Any

from rome import models
from rome.agent.world import TERMINAL, AgentConfig, SandboxConfig, World, policy_tokenizer
from rome.envs.task import Task
from rome.rollout.native.agent import NativeAgent, network_policy
from rome.rollout.native.config import NativeConfig
from rome.rollout.native.endpoint import Endpoint
from rome.rollout.native.external import ExternalSession, external_calls
from rome.rollout.native.proxy import Proxy
from rome.rollout.native.runner import NativeRunner
from rome.rollout.native.sessions import Sessions, Terms
from rome.text.render import Renderer


class NativeWorld(World):
  """A pool of sandboxes, the proxy, and foreign agents. A context manager.

  Args:
    sandbox, agent, size, env: as for `World`.
    native: the foreign agent, and who answers it.
    sampling: the distribution that the policy's replies are drawn from.
  Attributes:
    sessions: the episodes' keys.
    proxy: what the agents call.
    runner: makes a `NativeRunner` of what an `EpisodeRunner` is made of; with an
      endpoint the engine is a `NoEngine`.
  Raises:
    OSError: the proxy cannot listen.
    SandboxError, CustomError: as `World`.
  """

  def __init__(
    self,
    sandbox: SandboxConfig,
    agent: AgentConfig,
    native: NativeConfig,
    sampling: models.Sampling,
    size: int,
    env: str = TERMINAL,
  ):
    tokenizer = policy_tokenizer()
    terms = Terms(
      renderer=Renderer(tokenizer),
      stop_tokens=(tokenizer.end,),
      sampling=sampling,
      max_reply=agent.max_reply,
      max_length=agent.context,
      max_calls=agent.max_turns,
    )
    self._native = native
    self._endpoint: Endpoint | None = None
    if native.endpoint:
      self._endpoint = Endpoint(native)
      self.sessions = Sessions(terms, functools.partial(ExternalSession, self._endpoint))
      self.proxy = Proxy(self.sessions, native.model, external_calls)
    else:
      self.sessions = Sessions(terms)
      self.proxy = Proxy(self.sessions, native.model)
    self.runner: Callable[..., NativeRunner] = functools.partial(NativeRunner, self.sessions)
    try:
      policy = network_policy(native, self.proxy.address)
      super().__init__(sandbox, agent, size, env, policy)
    except BaseException:
      self._hang_up()
      raise

  def agent(self, task: Task) -> Any:
    """A foreign agent for one episode of `task`; it takes a sandbox when it begins."""
    return NativeAgent(self.environment(task), self._native)

  def close(self) -> None:
    try:
      super().close()
    finally:
      self._hang_up()

  def _hang_up(self) -> None:
    self.proxy.close()
    if self._endpoint:
      self._endpoint.close()
