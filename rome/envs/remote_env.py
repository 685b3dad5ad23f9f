"""`rome/Terminal-v0` on a service: the environment that `TerminalEnv` is in process."""

import base64
import os
import re
from collections.abc import Sequence
from typing import Any

import gymnasium

from rome.envs import families
from rome.envs import task as task_lib
from rome.envs.common import Limits
from rome.envs.remote import GRACE, Client, UnknownRemote, path
from rome.envs.terminal import UnicodeText

_NAME = re.compile(r"[a-z][a-z0-9_]*/[0-9]{1,18}")
START = 120.0  # seconds that a reset may wait for its sandbox


class RemoteEnv(gymnasium.Env[str, str]):
  """Episodes of shell tasks in sandboxes of a service; see `TerminalEnv` for what it means.

  Args:
    client: the service; it stays the caller's, who also closes it.
    task: the task of every episode: a `Task`, an id like "count/17", or a task directory here.
    tasks: several of them; `reset` picks one at random.
    max_turns, command_timeout, tests_timeout, max_observation: as of `TerminalEnv`.
    image: on the service's host; None for the base image.
    limits: of the sandboxes.

  Raises:
    TaskError, ValueError: as `TerminalEnv`.
    SandboxError: the service cannot be reached or refused.
  """

  metadata: dict[str, Any] = {"render_modes": []}

  def __init__(
    self,
    client: Client,
    task: families.TaskLike | None = None,
    tasks: Sequence[families.TaskLike] | None = None,
    *,
    max_turns: int = 6,
    command_timeout: float = 10.0,
    tests_timeout: float = 30.0,
    max_observation: int = 2000,
    image: str | None = None,
    limits: Limits | None = None,
  ):
    self._client = client
    self._step_timeout = command_timeout + tests_timeout + START
    self.observation_space = UnicodeText(task_lib.MAX_INSTRUCTION)
    self.action_space = UnicodeText(task_lib.MAX_INSTRUCTION)
    body: dict[str, Any] = {
      "max_turns": max_turns,
      "command_timeout": command_timeout,
      "tests_timeout": tests_timeout,
      "max_observation": max_observation,
      "image": image,
      "limits": vars(limits or Limits()),
    }
    if task is not None:
      body["task"] = _as_json(task)
    if tasks is not None:
      body["tasks"] = [_as_json(item) for item in tasks]
    self._id: str | None = client.call("POST", "/v1/envs", json=body).json()["id"]

  def reset(
    self, *, seed: int | None = None, options: dict[str, Any] | None = None
  ) -> tuple[str, dict[str, Any]]:
    """Starts an episode; see `TerminalEnv.reset`."""
    super().reset(seed=seed)
    options = dict(options or {})
    if "task" in options:
      options["task"] = _as_json(options["task"])
    answer = self._call("reset", {"seed": seed, "options": options}, START + GRACE)
    return answer["observation"], answer["info"]

  def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
    """Runs one command, or ends the episode; see `TerminalEnv.step`."""
    if not isinstance(action, str):
      raise TypeError(f"an action is a string, not {type(action).__name__}")
    out = self._call("step", {"action": action}, self._step_timeout)
    return out["observation"], out["reward"], out["terminated"], out["truncated"], out["info"]

  def close(self) -> None:
    """Closes it on the service too. Idempotent."""
    env_id, self._id = self._id, None
    if env_id is not None:
      try:
        self._client.call("DELETE", path("v1/envs", env_id), timeout=2 * GRACE)
      except UnknownRemote:
        pass  # the service closed it: it idled too long
    super().close()

  def _call(self, verb: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
    if self._id is None:
      raise gymnasium.error.ClosedEnvironmentError("the environment is closed: make another")
    url = f"{path('v1/envs', self._id)}/{verb}"
    return dict(self._client.call("POST", url, json=body, timeout=timeout).json())


def _as_json(task: families.TaskLike) -> str | dict[str, Any]:
  """A task for the service: by name where it has one there too, else whole."""
  if isinstance(task, str) and _NAME.fullmatch(task) and not os.path.exists(task):
    return task
  found = families.resolve_task(task)
  files = {
    name: {"base64": base64.b64encode(file.data).decode(), "mode": file.mode}
    for name, file in found.files.items()
  }
  return {
    "id": found.id,
    "family": found.family,
    "instruction": found.instruction,
    "files": files,
    "tests": found.tests,
  }
