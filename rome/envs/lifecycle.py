"""The states of a sandbox and the moves between them.

    pending -> running -> stopped -> deleted
       |          |          ^
       +--> failed (-> deleted), and a pending one can be stopped before it ran

`stop` and `delete` are idempotent: they do what is left to do, in legal moves, and nothing where
nothing is left. Every move is kept with its time and reason. There is no clock here and no lock:
whoever owns the sandbox brings both.
"""

from typing import Literal, NamedTuple

from rome.envs.common import SandboxError

State = Literal["pending", "running", "stopped", "deleted", "failed"]

MOVES: dict[State, tuple[State, ...]] = {
  "pending": ("running", "stopped", "failed"),
  "running": ("stopped", "failed"),
  "stopped": ("deleted",),
  "failed": ("deleted",),
  "deleted": (),
}


class IllegalTransition(SandboxError):
  """A move that the life cycle does not have; the message names both states."""


class Event(NamedTuple):
  """One move. `time` is in seconds of the clock that its owner uses."""

  time: float
  state: State
  reason: str


class Lifecycle:
  """The state of one sandbox.

  Attributes:
    history: every event so far, oldest first; the last one is the present state.
  """

  def __init__(self, now: float, reason: str = "created"):
    self.history = [Event(now, "pending", reason)]

  @property
  def state(self) -> State:
    return self.history[-1].state

  @property
  def finished(self) -> bool:
    """Whether it will never run (again)."""
    return self.state in ("stopped", "failed", "deleted")

  def move(self, state: State, now: float, reason: str) -> None:
    """Enters a state.

    Raises:
      IllegalTransition: the life cycle does not lead there from here.
    """
    if state not in MOVES[self.state]:
      allowed = " or ".join(MOVES[self.state]) or "nothing"
      raise IllegalTransition(
        f"a sandbox that is {self.state} cannot become {state}, only {allowed} ({reason})"
      )
    self.history.append(Event(now, state, reason))

  def stop(self, now: float, reason: str) -> bool:
    """Stops it unless it is over already. Returns whether it was not."""
    if self.finished:
      return False
    self.move("stopped", now, reason)
    return True

  def delete(self, now: float, reason: str) -> bool:
    """Deletes it unless it is already, stopping it first. Returns whether it was not."""
    if self.state == "deleted":
      return False
    self.stop(now, reason)
    self.move("deleted", now, reason)
    return True
