"""A session: one persistent bash of a sandbox, with or without a terminal.

`run` is one request and one answer. `start` and `poll` are the same command taken apart, for
programs that are to be followed, and with a terminal (`pty`) typed at, while they run.

Left out: several commands of one session at once (open several sessions), and a `send` that
overtakes a `poll` under way in another thread: requests of one session are answered in order.
"""

import codecs
import errno
import struct
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from rome.envs.common import CommandResult, SandboxError, SandboxLost
from rome.envs.rocklet import client

if TYPE_CHECKING:
  from rome.envs.sandbox import Sandbox

_OPENING = struct.Struct("<6I")  # uid, gid, rows, cols, bytes of directory and of environment
_AGENT = (1 << 32) - 1  # the uid that stands for the agent's
_PATIENCE = 0.1  # seconds between looks at `interrupt`
_FRESH = struct.Struct("<I")  # bytes of a poll's answer that are new
# Errors that are the request's, not the sandbox's: it lives on.
_REFUSED = frozenset(
  (errno.EBUSY, errno.ESRCH, errno.ENOTTY, errno.EAGAIN, errno.EINVAL, errno.EUSERS)
  + (errno.EFBIG, errno.EIO, errno.EBADF, errno.E2BIG)
)


class Progress(NamedTuple):
  """What a command did since the last poll.

  Attributes:
    output: what it wrote since, UTF-8 with replacement. Where more came than a result keeps
      (`Limits.output_bytes`), a line says how much is left out and which file has all of it.
    result: None while it runs; then its result, with all of its output as `Session.run` returns it.
  """

  output: str
  result: CommandResult | None


class Session:
  """One persistent bash: directory, variables, functions, aliases, options, traps and jobs live on.

  Attributes:
    name: for people; error messages and `Sandbox.stats` have it.
    interrupt: where it is an event, `run` stops its command as at a deadline once it is set.
  """

  interrupt: threading.Event | None = None

  def __init__(
    self,
    sandbox: "Sandbox",
    connection: client.Connection,
    name: str,
    *,
    user: str | int = "agent",
    pty: tuple[int, int] | None = None,
    cwd: str = "",
    env: Mapping[str, str] | None = None,
    state: bytes = b"",
  ):
    """Opens it on a connection; see `Sandbox.session`."""
    if not name.isprintable() or not 0 < len(name.encode()) <= 64:
      raise ValueError(f"a session's name must be 1 to 64 printable bytes, not {name!r}")
    rows, cols = pty or (0, 0)
    if pty is not None and not (0 < rows < 65536 and 0 < cols < 65536):
      raise ValueError(f"pty must be rows and columns from 1 to 65535, not {pty!r}")
    self.name = name
    self._sandbox = sandbox
    self._connection = connection
    self._started = 0.0
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
    self._uid, self._rows, self._cols = _uid(user), rows, cols
    self._place = _bytes("cwd", cwd), b"".join(_pair(*pair) for pair in (env or {}).items())
    self.restore(state)

  def run(self, command: str, timeout: float = 10.0) -> CommandResult:
    """Runs a command to its end; its stdin is /dev/null, or the terminal.

    At the deadline the command and what it started end, and the session lives on with its state.

    Args:
      command: any bash text, of several lines too.
      timeout: seconds.

    Raises:
      ValueError: the command holds a NUL, which bash cannot, or the timeout is not positive.
      SandboxError: a command of `start` still runs, or its result has not been polled.
      SandboxLost: the sandbox died.
    """
    start = time.perf_counter()
    if self.interrupt is not None:
      return self._run_until(self.interrupt, command, timeout)
    reply = self._call(client.RUN, _text(command), timeout)
    return command_result(reply, reply.data, start)

  def start(self, command: str, timeout: float = 3600.0) -> None:
    """Starts a command and returns at once; `poll` follows it.

    Args:
      command: any bash text.
      timeout: seconds after which it is stopped as by `run`, polled or not.

    Raises:
      ValueError, SandboxError, SandboxLost: as of `run`.
    """
    self._started = time.perf_counter()
    self._decoder.reset()
    self._call(client.START, _text(command), timeout)

  def poll(self, timeout: float = 10.0) -> Progress:
    """Waits until the started command has written something or has ended, or for `timeout` seconds.

    Raises:
      SandboxError: no command was started.
      SandboxLost: the sandbox died.
    """
    return self._poll(timeout, stop=False)

  def wait(self, timeout: float = 10.0) -> CommandResult:
    """Waits for the started command's end; what it wrote in between is in the result, too.

    Raises:
      TimeoutError: it runs on after `timeout` seconds.
      SandboxError: no command was started.
      SandboxLost: the sandbox died.
    """
    deadline = time.monotonic() + timeout
    while True:
      left = deadline - time.monotonic()
      if result := self.poll(max(left, 0.001)).result:
        return result
      if left <= 0:
        raise TimeoutError(f"the command runs on after {timeout:g} s: wait again, or stop() it")

  def stop(self) -> Progress:
    """Stops the started command now, as `run` does at a deadline; the result says `timed_out`.

    Raises:
      SandboxError: no command was started.
      SandboxLost: the sandbox died.
    """
    return self._poll(10.0, stop=True)

  def send(self, data: bytes, timeout: float = 10.0) -> None:
    r"""Types into the terminal of the running command: b"\x03" is Ctrl-C, b"\x04" the end of input.

    As in any terminal, bash misses a Ctrl-C that comes while it forks, some milliseconds long: who
    sees by `poll` that the command runs on sends another.

    Raises:
      SandboxError: there is no terminal, no command runs, or it did not read for `timeout` seconds.
      SandboxLost: the sandbox died.
    """
    self._call(client.SEND, data, timeout)

  def resize(self, rows: int, cols: int) -> None:
    """Sets the terminal's size; its programs get SIGWINCH.

    Raises:
      SandboxError: there is no terminal, or a number is not from 1 to 65535.
      SandboxLost: the sandbox died.
    """
    if not (0 < rows < 65536 and 0 < cols < 65536):
      raise SandboxError(f"a terminal has 1 to 65535 rows and columns, not {rows} and {cols}")
    self._call(client.RESIZE, mode=rows << 16 | cols)

  def state(self, timeout: float = 10.0) -> bytes:
    """Returns what `restore` needs to make a shell like this one, as bash text.

    It holds directory, variables, functions, aliases, options, umask and traps, but no jobs. Never
    run it anywhere but in a sandbox: whoever uses the session decides what is in it.

    Raises:
      SandboxError: a command runs, or the state is longer than 4 MiB.
      SandboxLost: the sandbox died.
    """
    return self._call(client.STATE, timeout=timeout).data

  def restore(self, state: bytes) -> None:
    """Ends the shell and what runs in it; a new one, of the same user, starts from a state.

    Raises:
      SandboxError: the user cannot be had here, or too many sessions are open.
      SandboxLost: the sandbox died.
    """
    cwd, env = self._place
    head = _OPENING.pack(self._uid, self._uid, self._rows, self._cols, len(cwd), len(env))
    self._call(client.OPEN, head + cwd + env + state, name=self.name)

  def close(self) -> None:
    """Ends the shell and what still runs in it."""
    self._connection.close()

  def _run_until(self, interrupt: threading.Event, command: str, timeout: float) -> CommandResult:
    self.start(command, timeout)
    while not interrupt.is_set():
      if result := self.poll(_PATIENCE).result:
        return result
    result = self.stop().result
    assert result is not None
    return result

  def _poll(self, timeout: float, stop: bool) -> Progress:
    reply = self._call(client.POLL, timeout=timeout, mode=int(stop))
    (fresh,) = _FRESH.unpack_from(reply.data)
    end = _FRESH.size + fresh
    running = bool(reply.flags & client.RUNNING)
    output = self._decoder.decode(reply.data[_FRESH.size : end], final=not running)
    if running:
      return Progress(output, None)
    return Progress(output, command_result(reply, reply.data[end:], self._started))

  def _call(
    self, op: int, data: bytes = b"", timeout: float = 10.0, *, name: str = "", mode: int = 0
  ) -> client.Reply:
    if not 0 < timeout <= 86400:
      raise ValueError(f"timeout must be between 0 and 86400 seconds, not {timeout}")
    try:
      return self._sandbox._call(self._connection, op, name, data, timeout=timeout, mode=mode)
    except client.RequestError as error:
      message = f"session {self.name!r} of sandbox {self._sandbox.id}: {error}"
      kind = SandboxError if error.errno in _REFUSED else SandboxLost
      raise kind(message) from error


def command_result(reply: client.Reply, output: bytes, start: float) -> CommandResult:
  """The result that an answer of rocklet tells of a command started at `start` (perf_counter)."""
  timed_out = bool(reply.flags & client.TIMED_OUT)
  return CommandResult(
    None if timed_out else reply.exit_code,
    output.decode("utf-8", "replace"),
    timed_out,
    bool(reply.flags & client.TRUNCATED),
    time.perf_counter() - start,
  )


def _text(command: str) -> bytes:
  if "\0" in command:
    raise ValueError("a command cannot hold a NUL character")
  return command.encode("utf-8", "surrogateescape")


def _bytes(what: str, text: str) -> bytes:
  if "\0" in text:
    raise ValueError(f"{what} {text!r} cannot hold a NUL character")
  return text.encode("utf-8", "surrogateescape")


def _pair(name: str, value: str) -> bytes:
  if not name.isidentifier() or not name.isascii():
    raise ValueError(f"{name!r} is no name of an environment variable")
  return _bytes("a variable", f"{name}={value}") + b"\0"


def _uid(user: str | int) -> int:
  if user == "agent":
    return _AGENT
  if user == "root":
    return 0
  if not isinstance(user, int) or isinstance(user, bool) or not 1000 <= user <= 65533:
    raise ValueError(f"user must be 'agent', 'root' or a uid from 1000 to 65533, not {user!r}")
  return user
