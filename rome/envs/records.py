"""What a manager knows of one sandbox, and the errors it raises about them."""

import dataclasses
import secrets
import threading

from rome.envs.common import SandboxError, SandboxSpec
from rome.envs.lifecycle import Event, Lifecycle, State
from rome.envs.sandbox import Sandbox


class UnknownSandbox(SandboxError, KeyError):
  """There is no such sandbox, or it ended so long ago that it is forgotten."""

  def __str__(self) -> str:  # KeyError would show the quotes of repr
    return str(self.args[0])


class CreationFailed(SandboxError):
  """A sandbox did not come to run; its cause, where there is one, is the backend's error."""


class ManagerClosed(SandboxError):
  """The manager is closed, or drains and takes nothing new."""


@dataclasses.dataclass(eq=False)
class Record:
  """A sandbox from the request for it until it is forgotten. Only its manager changes it.

  Attributes:
    spec: what was asked for.
    tenant: on whose behalf.
    host: where it runs; '' while that is not settled.
    life: its state and history, in seconds of the epoch.
    requested, deadline: when it was asked for and until when it must run, in seconds of the
      manager's clock.
    sandbox: None unless it is running.
    error: why it failed; None unless it has.
    cause: the exception behind `error`.
    started, touched: when it came to run and was last used, in seconds of the manager's clock.
    ended: when it stopped or failed.
    settled: set once it is no longer pending.
    id: its name.
  """

  spec: SandboxSpec
  tenant: str
  host: str
  life: Lifecycle
  requested: float
  deadline: float
  sandbox: Sandbox | None = None
  error: str | None = None
  cause: BaseException | None = None
  started: float = 0.0
  touched: float = 0.0
  ended: float = 0.0
  settled: threading.Event = dataclasses.field(default_factory=threading.Event, repr=False)
  id: str = dataclasses.field(default_factory=lambda: f"sb-{secrets.token_hex(8)}")

  @property
  def state(self) -> State:
    return self.life.state

  @property
  def history(self) -> list[Event]:
    """(time, state, reason) of every event, oldest first."""
    return list(self.life.history)

  def checked(self) -> "Record":
    """This record, if it is running.

    Raises:
      SandboxError: it has failed; the error it failed with.
      CreationFailed: it is in another state.
    """
    if self.state == "running":
      return self
    if isinstance(self.cause, SandboxError):
      raise self.cause
    what = self.error or f"it is {self.state}: {self.history[-1].reason}"
    raise CreationFailed(f"sandbox {self.id} does not run: {what}") from self.cause
