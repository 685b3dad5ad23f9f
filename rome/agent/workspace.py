"""What the tools of an agent act on: a sandbox, its shell, a current directory, what was read.

    workspace = Workspace(sandbox)
    workspace.run("cd src; make")           # the agent's shell: the sandbox's default session
    file = workspace.read("Makefile")       # relative to where the shell is now
    workspace.write("Makefile", file.data + b"all:\\n", expected=file.digest)

The sandbox's own file calls act as root. An agent may do here only what its user may: whatever
concerns a path is decided by the kernel in a second shell of the agent's user. Bytes still travel
by the file calls, as they are fast. They are read as root, but only handed out where the agent's
user proved that it can read them: it computed the SHA-256 of a nonce and the same bytes, so that no
race of names and no known digest shows more. They are written as root to a hidden name, which the
agent's user then moves into place.

Works in every image that has bash and the usual commands (busybox's do), in every backend of
`rome.envs`. Left out: sandboxes behind the service, whose refusals cannot be told from failures.
"""

import base64
import binascii
import contextlib
import dataclasses
import errno
import hashlib
import math
import os
import posixpath
import secrets
import shlex
import threading
import time
from collections.abc import Sequence

from rome.agent.tools import show
from rome.envs.common import CommandResult
from rome.envs.rocklet.client import RequestError
from rome.envs.sandbox import Sandbox

MAX_FILE = 16 << 20  # bytes of a file that tools read and edit
MAX_COMMAND = 1 << 20  # characters
SHELL_TIMEOUT = 120.0  # seconds
SHOWN = 30_000  # characters of one result
_ASK_TIMEOUT = 10.0  # seconds
_LEAST = 0.05  # seconds that are worth a command
_MIN_OUTPUT = 4096
_MARK = "\x1ecwd\x1e"
_KILLED = 137  # status of a shell that was killed

# Statuses of the scripts below, and what the model is told.
_WHY = {
  2: "no such file or directory",
  5: "it cannot be read to its end",
  13: "permission denied",
  17: "it is there and is no regular file",
  20: "its directory is not there and cannot be made",
  21: "it is a directory; see list",
  22: "it is no regular file but a device, pipe or socket",
  27: f"it is larger than {MAX_FILE >> 20} MiB; use the shell",
  39: "it has changed since it was read; read it again",
}
# They say the resolved path in one line: "=" where it is as it was asked, else in base64.
_RESOLVE = """
p=$(readlink -nf -- "$1" && echo x) || exit 2
p=${p%x}
[ "$p" = "$1" ] && r== || r=$(printf %s "$p" | base64 -w0)
"""
_LOOK = (
  _RESOLVE
  + """
[ -d "$p" ] && exit 21
[ -e "$p" ] || exit 2
[ -f "$p" ] || exit 22
[ -r "$p" ] || exit 13
set -o pipefail
d=$(printf %s "$2" | cat - "$p" | sha256sum) || exit 5
echo "${d%% *} $r"
"""
)
_AIM = (
  """
[ -d "${1%/*}/" ] || mkdir -p -- "${1%/*}" || exit 20
"""
  + _RESOLVE
  + """
[ -d "$p" ] && exit 21
[ -w "${p%/*}/" ] || exit 13
m=644
if [ -e "$p" ]; then
  [ -f "$p" ] || exit 17
  [ -w "$p" ] || exit 13
  m=$(stat -c %a -- "$p")
fi
echo "$m $r"
"""
)
# Its time is that of the writing: builds go by it.
_MOVE = """
if [ -n "$3" ]; then d=$(sha256sum <"$2"); [ "${d%% *}" = "$3" ] || exit 39; fi
touch -c -- "$1" && mv -fT -- "$1" "$2" || exit 13
"""
_DROP = 'rm -f -- "$1"'
_DIGESTS = """
for f; do [ -f "$f" ] && [ -r "$f" ] && d=$(sha256sum <"$f") && echo "${d%% *}" || echo -; done
"""
_NO_ROOM = "the sandbox did not do it; it may have no room for another process: end some, try again"


class Refused(Exception):
  """What was wanted of the workspace cannot be done; the message is for the model.

  Attributes:
    outcome: of the tool's result, see `ToolResult`.
    missing: whether nothing is there.
  """

  def __init__(self, message: str, outcome: str = "error", missing: bool = False):
    super().__init__(message)
    self.outcome, self.missing = outcome, missing


@dataclasses.dataclass(frozen=True)
class File:
  """A file that was read.

  Attributes:
    path: absolute, links resolved.
    data: all of it.
    digest: its SHA-256, hexadecimal.
  """

  path: str
  data: bytes
  digest: str


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a script of `Workspace.ask` printed.

  Attributes:
    data: its output.
    status: its exit status.
    cut: whether there was more than is told.
  """

  data: bytes
  status: int
  cut: bool


class Workspace:
  """See the module. Thread-safe but for `run`. The sandbox stays the caller's.

  Args:
    sandbox: fresh or reset; of the backends of `rome.envs`.
    root: the project's directory, where notes lie; by default the sandbox's work directory.
    shell_timeout: seconds that a command may take where the model names none.
    shown: characters of one result.
  Attributes:
    seen: SHA-256 of each file when the agent was shown it or wrote it last, by resolved path.
    together: seconds that commands have together, see `allow`; without a bound at first.
  Raises:
    ValueError: the sandbox's limits leave no room for answers.
    SandboxError: the sandbox failed.
  """

  def __init__(
    self,
    sandbox: Sandbox,
    root: str = "",
    shell_timeout: float = SHELL_TIMEOUT,
    shown: int = SHOWN,
  ):
    if sandbox.limits.output_bytes < _MIN_OUTPUT:
      have = sandbox.limits.output_bytes
      raise ValueError(f"Limits.output_bytes is {have}; an agent needs at least {_MIN_OUTPUT}")
    self.sandbox, self.root = sandbox, root or sandbox.workdir
    self.shell_timeout, self.shown = shell_timeout, shown
    self.seen: dict[str, str] = {}
    self._helper = sandbox.session("tools")
    self._cwd: str | None = sandbox.workdir  # None where the shell may have gone elsewhere
    self._held = ""  # output that came while the shell was asked something else
    self._asking = threading.Lock()
    self.together = math.inf  # seconds that commands have from the last `allow` on
    self._until = math.inf

  def close(self) -> None:
    """Ends the second shell; the sandbox stays."""
    self._helper.close()

  def allow(self, seconds: float) -> None:
    """From now on commands have so many seconds together; what tools and skills ask, 10 s more."""
    self.together, self._until = seconds, time.monotonic() + seconds

  def _bounded(self, timeout: float, more: float = 0.0) -> float:
    """So many seconds, or those that are left."""
    left = self._until + more - time.monotonic()
    if left < _LEAST:
      raise Refused(f"the {self.together:g} s that a reply's calls have are used up", "timeout")
    return min(timeout, left)

  def run(self, command: str, timeout: float | None = None) -> CommandResult:
    """Runs a command in the agent's shell; see `Session.run`.

    Raises:
      Refused: no shell can be given it, or no time is left (`allow`).
      SandboxError: the sandbox failed.
    """
    if len(command) > MAX_COMMAND:
      raise Refused(f"the command has {len(command)} characters, at most {MAX_COMMAND} may be")
    check(command, "the command")
    timeout = self._bounded(timeout or self.shell_timeout)
    self._cwd = None
    result = self.sandbox.run(command, timeout)
    held, self._held = self._held, ""
    return dataclasses.replace(result, output=held + result.output) if held else result

  def forget(self) -> None:
    """The sandbox was restored: where its shell is has to be asked."""
    self._cwd = None

  def cwd(self) -> str:
    """Where the agent's shell is.

    Raises:
      Refused: its directory is gone.
      SandboxError: the sandbox failed.
    """
    with self._asking:
      if self._cwd is None:
        self._cwd = self._ask_cwd()
      return self._cwd

  def _ask_cwd(self) -> str:
    # One write between marks: what jobs in the background print meanwhile is kept for `run`.
    script = f"builtin printf %s '{_MARK}'\"$(builtin pwd -P 2>/dev/null)\"'/{_MARK}'"
    seconds = self._bounded(5.0, _ASK_TIMEOUT)
    before, _, rest = self.sandbox.run(script, seconds).output.partition(_MARK)
    path, found, after = rest.partition("/" + _MARK)
    self._held += before + after
    if not found or not path.startswith("/"):
      raise Refused("the shell's current directory is gone: cd elsewhere, or give absolute paths")
    return path

  def place(self, path: str) -> str:
    """The path from the root directory; not resolved, and there may be nothing.

    Raises:
      Refused: it can be no path.
    """
    check(path, "the path")
    if not path:
      raise Refused("the path is empty", "invalid_arguments")
    if len(os.fsencode(path)) > 4000:
      raise Refused("the path is longer than 4000 bytes", "invalid_arguments")
    whole = path if path.startswith("/") else posixpath.join(self.cwd(), path)
    return "/" + "/".join(part for part in whole.split("/") if part not in ("", "."))

  def read(self, path: str) -> File:
    """A regular file, whole; links are followed.

    Raises:
      Refused: the agent may not read it, or it is none, too large, or never the same twice.
      SandboxError: the sandbox failed.
    """
    told, place = show.name(path), self.place(path)
    for _ in range(2):
      nonce = secrets.token_hex(16)
      proof, _, found = self._asked(_LOOK, told, place, nonce).partition(" ")
      found = _resolved(found, place)
      data = self._fetch(found, told)
      if hashlib.sha256(nonce.encode() + data).hexdigest() == proof:
        return File(found, data, hashlib.sha256(data).hexdigest())
    why = "it changes while it is read, or has no size (as in /proc); use the shell"
    raise Refused(f"{told}: {why}")

  def find(self, path: str) -> File | None:
    """`read`, None where there is nothing."""
    try:
      return self.read(path)
    except Refused as error:
      if error.missing:
        return None
      raise

  def write(self, path: str, data: bytes, expected: str = "") -> str:
    """Writes a file whole or not at all; directories that miss are made, its mode is kept.

    Args:
      path: links are followed.
      data: the content.
      expected: digest that the file must still have.
    Returns:
      The path, links resolved.
    Raises:
      Refused: the agent may not write it, or there is something else.
      SandboxError: the sandbox failed.
    """
    told = show.name(path)
    if len(data) > MAX_FILE:
      raise Refused(f"{told}: {_WHY[27]}")
    if path.endswith("/"):
      raise Refused(f"{told}: {_WHY[21]}")
    place = self.place(path)
    mode, _, found = self._asked(_AIM, told, place).partition(" ")
    aim = _resolved(found, place)
    stage = posixpath.join(self.sandbox.workdir, f".rome-{secrets.token_hex(8)}")
    try:
      self.sandbox.write_file(stage, data, mode=number(mode, 8) & 0o777)
      self._asked(_MOVE, told, stage, aim, expected)
    except RequestError as error:
      raise Refused(f"{told}: it cannot be written: {os.strerror(error.errno)}") from error
    except Refused:
      self._drop(stage)
      raise
    self.seen[aim] = hashlib.sha256(data).hexdigest()
    return aim

  def changed(self) -> list[str]:
    """Files that are not what they were when the agent read or wrote them last, sorted.

    Raises:
      SandboxError: the sandbox failed.
    """
    paths, found = sorted(self.seen), []
    for at in range(0, len(paths), 32):
      some = paths[at : at + 32]
      lines = self.ask(_DIGESTS, *some).data.decode("ascii", "replace").split("\n")
      found += [path for path, now in zip(some, lines, strict=False) if now != self.seen[path]]
    return found

  def ask(self, script: str, *args: str, timeout: float = _ASK_TIMEOUT) -> Answer:
    """Runs a script as the agent's user, in a shell that the agent does not see.

    Args:
      script: bash; its errors are dropped, of its output as much is told as a result may hold.
      args: $1, $2, …
      timeout: seconds.
    Raises:
      Refused: it took too long.
      SandboxError: the sandbox failed.
    """
    room = min(self.shown, (self.sandbox.limits.output_bytes - 256) * 3 // 4)
    tail = f"| head -c {room + 1} | base64 -w0; (exit ${{PIPESTATUS[0]}})"
    line, status = self._line(script, args, timeout, tail)
    try:
      data = base64.b64decode(line, validate=True)
    except (binascii.Error, ValueError) as error:
      raise Refused(_NO_ROOM) from error
    return Answer(data[:room], status, len(data) > room)

  def _asked(self, script: str, told: str, *args: str) -> str:
    """The line that a script says; a status other than 0 is a refusal. Cheaper than `ask`."""
    try:
      line, status = self._line(script, args)
    except Refused as error:
      raise Refused(f"{told}: {error}", error.outcome) from error
    if status:
      raise Refused(f"{told}: {_WHY.get(status, _NO_ROOM)}", missing=status == 2)
    return line

  def _line(
    self, script: str, args: Sequence[str], timeout: float = _ASK_TIMEOUT, tail: str = ""
  ) -> tuple[str, int]:
    """The last line that a script says, and its exit status.

    Before it there may be one of the sandbox: that the shell had ended, for one.
    """
    command = (
      f"( set -- {shlex.join(args)}\nLC_ALL=C\ncd /\n{script}\n) 2>/dev/null </dev/null {tail}"
    )
    result = self._helper.run(command, self._bounded(timeout, _ASK_TIMEOUT))
    if result.exit_code == _KILLED:  # with the agent's other processes, by the agent itself
      result = self._helper.run(command, self._bounded(timeout, _ASK_TIMEOUT))
    if result.timed_out or result.exit_code is None:
      raise Refused(f"it took longer than {timeout:g} s and was stopped", "timeout")
    return result.output.removesuffix("\n").rpartition("\n")[2], result.exit_code

  def _fetch(self, path: str, told: str) -> bytes:
    if self.sandbox.backend == "process" and not path.startswith(self.sandbox.workdir + "/"):
      raise Refused(f"{told}: it lies outside {self.sandbox.workdir}; use the shell")
    try:
      return self.sandbox.read_file(path, MAX_FILE)
    except RequestError as error:
      if error.errno == errno.EFBIG:
        raise Refused(f"{told}: {_WHY[27]}") from error
      if error.errno in (errno.ENOENT, errno.ESTALE, errno.EAGAIN):
        return b""  # gone or changed since: the digest says so
      raise Refused(f"{told}: it cannot be read: {os.strerror(error.errno)}") from error

  def _drop(self, path: str) -> None:
    """Removes what was staged, as the agent's user: by now there may be something of root's."""
    with contextlib.suppress(Refused):
      self._line(_DROP, [path])


def _resolved(said: str, place: str) -> str:
  """The path that `_RESOLVE` says.

  Raises:
    Refused: it is garbled.
  """
  if said == "=":
    return place
  try:
    path = os.fsdecode(base64.b64decode(said, validate=True))
  except (binascii.Error, ValueError) as error:
    raise Refused(_NO_ROOM) from error
  if not path.startswith("/") or "\0" in path or ".." in path.split("/") or len(path) > 4095:
    raise Refused(_NO_ROOM)
  return path


def number(said: str, base: int = 10) -> int:
  """A number that a script says; other processes of the agent's user can garble it.

  Raises:
    Refused: it is none.
  """
  try:
    return int(said, base)
  except ValueError as error:
    raise Refused(_NO_ROOM) from error


def check(text: str, what: str) -> None:
  """Refuses text that cannot be said to a shell."""
  if "\0" in text:
    raise Refused(f"{what} holds a NUL character", "invalid_arguments")
  try:
    text.encode("utf-8", "surrogateescape")
  except UnicodeEncodeError as error:
    raise Refused(f"{what} holds an unpaired surrogate", "invalid_arguments") from error
