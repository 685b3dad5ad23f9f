"""The JSON that goes in and out, typed; OpenAPI is made of these. Unknown fields are refused.

Bounds that are the host's business (how much memory there is) are checked where they are known;
here stand those that hold everywhere.
"""

import binascii
import dataclasses
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from rome.envs.common import CommandResult, Limits
from rome.envs.task import Task, TaskFile

MAX_COMMAND = 1 << 20  # characters
MAX_SECONDS = 86400.0
MAX_TIMEOUT = 3600.0  # seconds a command may take over HTTP; start and poll longer ones

Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]
CommandText = Annotated[
  str, Field(max_length=MAX_COMMAND, pattern=r"^[^\x00]*$", description="bash text without NUL")
]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
ImageName = Annotated[
  str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:/@-]{0,254}$", description="a local image")
]


class _In(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class LimitsModel(_In):
  """Upper bounds of one sandbox; see `rome.envs.Limits`."""

  memory_mb: int = Field(default=256, ge=16, le=1 << 20, description="MiB, tmpfs included")
  cpus: float = Field(default=1.0, ge=0.01, le=1024, description="share of processors")
  pids: int = Field(default=64, ge=4, le=1 << 20, description="processes and threads")
  disk_mb: int = Field(default=16, ge=1, le=1 << 20, description="MiB of what can be written")
  open_files: int = Field(
    default=1024, ge=256, le=1 << 20, description="descriptors of one process"
  )
  output_bytes: int = Field(
    default=16384, ge=64, le=1 << 24, description="of a command's output, kept"
  )

  def limits(self) -> Limits:
    return Limits(**self.model_dump())

  @classmethod
  def of(cls, limits: Limits) -> "LimitsModel":
    return cls(**dataclasses.asdict(limits))


class Event(pydantic.BaseModel):
  """One change of a sandbox's state."""

  time: float = Field(description="seconds since 1970")
  state: str
  reason: str


State = Literal["pending", "running", "stopped", "deleted", "failed"]


class SandboxView(pydantic.BaseModel):
  """A sandbox as the service knows it."""

  id: str
  state: State
  image: str | None = Field(description="None until it is known")
  backend: str | None = Field(description="None until it is known")
  workdir: str | None = Field(description="where commands start; None unless it runs")
  limits: LimitsModel
  labels: dict[str, str]
  ttl: float = Field(description="seconds from its start to its end")
  idle_ttl: float = Field(description="seconds without a call to its end")
  host: str
  error: str | None = Field(description="why it failed")
  history: list[Event]


class SandboxList(pydantic.BaseModel):
  """All sandboxes of the tenant that the service remembers."""

  sandboxes: list[SandboxView]


class CommandIn(_In):
  """A command and its deadline in seconds."""

  command: CommandText
  timeout: float = Field(default=10.0, gt=0, le=MAX_TIMEOUT)


class CommandOut(pydantic.BaseModel):
  """What a command did; see `rome.envs.CommandResult`."""

  exit_code: int | None = Field(description="as bash counts it; null if the time ran out")
  output: str
  timed_out: bool
  truncated: bool
  duration: float = Field(description="seconds")

  @classmethod
  def of(cls, result: CommandResult) -> "CommandOut":
    return cls(**dataclasses.asdict(result))


class TaskFileIn(_In):
  """A file of a task: its content as text (UTF-8) or in base64."""

  text: str | None = Field(default=None, max_length=1 << 20)
  base64: str | None = Field(default=None, max_length=1 << 21)
  mode: int = Field(default=0o644, ge=0, le=0o777)

  def file(self) -> TaskFile:
    if (self.text is None) == (self.base64 is None):
      raise ValueError("a file of a task has either text or base64")
    if self.text is not None:
      return TaskFile(self.text.encode("utf-8", "surrogateescape"), self.mode)
    return TaskFile(binascii.a2b_base64(self.base64 or "", strict_mode=True), self.mode)


class TaskIn(_In):
  """A task given whole, instead of by its name."""

  id: str = Field(min_length=1, max_length=200)
  family: str = Field(default="given", pattern=r"^[a-z][a-z0-9_]*$")
  instruction: str = Field(min_length=1, max_length=65536)
  files: dict[str, TaskFileIn] = Field(default_factory=dict, max_length=1000)
  tests: str = Field(min_length=1, max_length=1 << 20)

  def task(self) -> Task:
    files = {path: file.file() for path, file in self.files.items()}
    return Task(self.id, self.family, self.instruction, files, self.tests)


# A task by name is always family/seed: a name that could be a path of the host is never resolved.
TaskName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*/[0-9]{1,18}$", examples=["count/17"])]
AnyTask = TaskName | TaskIn


class EnvIn(_In):
  """What to make; the rest as the arguments of `rome.envs.TerminalEnv`."""

  env_id: Literal["rome/Terminal-v0"] = "rome/Terminal-v0"
  task: AnyTask | None = None
  tasks: list[AnyTask] | None = Field(default=None, min_length=1, max_length=1000)
  seed: int | None = Field(
    default=None, ge=0, le=2**63 - 1, description="of the first reset without one"
  )
  max_turns: int = Field(default=6, ge=1, le=10000)
  command_timeout: float = Field(default=10.0, gt=0, le=MAX_TIMEOUT)
  tests_timeout: float = Field(default=30.0, gt=0, le=MAX_TIMEOUT)
  max_observation: int = Field(default=2000, ge=32, le=32768)
  image: ImageName | None = None
  limits: LimitsModel = LimitsModel()


class EnvView(pydantic.BaseModel):
  """An environment; it holds a sandbox from reset to the end of the episode."""

  id: str
  env_id: str
  sandbox: str | None = Field(description="the sandbox of the running episode")


class EnvList(pydantic.BaseModel):
  """All environments of the tenant."""

  envs: list[EnvView]


class ResetOptions(_In):
  """Options of a reset."""

  task: AnyTask | None = None


class ResetIn(_In):
  """Arguments of `reset`."""

  seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
  options: ResetOptions | None = None


class ResetOut(pydantic.BaseModel):
  """What `reset` returns."""

  observation: str
  info: dict[str, Any]


def _text(value: Any) -> str:
  if not isinstance(value, str):
    raise ValueError("must be a string")
  return value


class StepIn(_In):
  """Arguments of `step`. The action may be any JSON string, unpaired surrogates included: what a
  shell cannot run is answered by the environment, as in process."""

  action: Annotated[
    Any, pydantic.AfterValidator(_text), pydantic.WithJsonSchema({"type": "string"})
  ]


class StepOut(pydantic.BaseModel):
  """What `step` returns."""

  observation: str
  reward: float
  terminated: bool
  truncated: bool
  info: dict[str, Any]


class Health(pydantic.BaseModel):
  """Whether the service is there."""

  status: Literal["ok"]
