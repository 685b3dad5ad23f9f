"""A session: one persistent bash of a sandbox."""

from typing import TYPE_CHECKING

from rome.envs.common import CommandResult
from rome.envs.rocklet import client

if TYPE_CHECKING:
  from rome.envs.sandbox import Sandbox


class Session:
  """One persistent bash of the agent: directory, variables, functions and jobs live on."""

  def __init__(self, sandbox: "Sandbox", connection: client.Connection):
    self._sandbox = sandbox
    self._connection = connection

  def run(self, command: str, timeout: float = 10.0) -> CommandResult:
    """Runs a command; its stdin is /dev/null.

    At the deadline the command and what it started end, and the session lives on with its state.

    Args:
      command: any bash text, of several lines too.
      timeout: seconds.

    Raises:
      ValueError: the command holds a NUL, which bash cannot, or the timeout is not positive.
      SandboxLost: the sandbox died.
    """
    if "\0" in command:
      raise ValueError("a command cannot hold a NUL character")
    return self._sandbox._execute(self._connection, client.RUN, command, timeout)

  def close(self) -> None:
    """Ends the shell and what still runs in it."""
    self._connection.close()
