"""A sandbox: an unprivileged shell, files and a verifier behind one small class.

`Sandbox` speaks to the rocklet inside; the backends differ only in how they start one. The default
session lives on the connection that also owns the sandbox: when it closes, by `close` or by the
death of this process, the sandbox ends.

Left out: images by recipe, fork and commit, network policy, and the service over HTTP.
"""

import os
import secrets
import time
from types import TracebackType

from rome.envs import owner, transfer, trees
from rome.envs.backends import Backend, Launched
from rome.envs.common import (
  BackendUnavailable,
  CommandResult,
  ImageError,
  Limits,
  SandboxError,
  SandboxLost,
)
from rome.envs.live import BACKENDS, close_all, enter, prepare_process, sweep
from rome.envs.rocklet import client
from rome.envs.session import Session

__all__ = [
  "BACKENDS",
  "BackendUnavailable",
  "CommandResult",
  "ImageError",
  "Limits",
  "Sandbox",
  "SandboxError",
  "SandboxLost",
  "Session",
  "close_all",
  "make_sandbox",
  "sweep",
]

START_TIMEOUT = 30.0  # seconds from the launch to the first answer


class Sandbox:
  """A running sandbox; made by `make_sandbox`. Use it as a context manager, or call `close`.

  Attributes:
    id: its name, also that of the container.
    backend: "podman", "bubblewrap" or "process".
    image: the image it runs.
    workdir: where commands start; relative paths of files start there too.
  """

  def __init__(self, backend: Backend, image: str | None, limits: Limits):
    self.id = f"rome-{secrets.token_hex(6)}"
    self.backend = backend.name
    self.image = backend.image(image)
    self._backend = backend
    self._closed = False
    self._home = owner.new_dir(self.id)
    self._launched: Launched | None = None
    self._main: client.Connection | None = None
    self._idle: list[client.Connection] = []  # for files; see transfer.channel
    enter(self)
    try:
      self._launched = backend.launch(self.id, self.image, limits, self._home)
      self.workdir = self._launched.workdir
      self._main = self._connect(START_TIMEOUT)
      self._idle.append(self._connect(START_TIMEOUT))
      if not self.stats()["bash"]:
        raise ImageError(f"image {self.image!r} holds no bash: add bash to it")
    except BaseException:
      self.close()
      raise
    self._session = Session(self, self._main)

  def run(self, command: str, timeout: float = 10.0) -> CommandResult:
    """Runs a command in the default session; see `Session.run`."""
    return self._session.run(command, timeout)

  def session(self, name: str) -> Session:
    """Opens an independent session. `name` is for the reader; at most 15 can be open.

    Raises:
      SandboxLost: the sandbox died, or too many sessions are open.
    """
    del name
    return Session(self, self._connect(5.0))

  # Files; transfer.py and trees.py do the work.

  def write_file(self, path: str, data: bytes, mode: int = 0o644, owner: str = "agent") -> None:
    """Writes a file whole or not at all; directories that miss are made, symbolic links refused.

    Its time is fixed (2020-01-01), so that listings do not tell when an episode ran.

    Args:
      path: absolute, or relative to the work directory.
      data: the content.
      mode: permission bits.
      owner: "agent" or "root"; with one user only (see the backends) they are the same.

    Raises:
      SandboxError: it cannot be written; the message says why.
      SandboxLost: the sandbox died.
    """
    transfer.write_file(self, path, data, mode, owner)

  def read_file(self, path: str, max_bytes: int = 16 << 20) -> bytes:
    """Reads a regular file as root; symbolic links are refused.

    Raises:
      SandboxError: there is none, it is no regular file, it is longer than `max_bytes`, or it
        changed meanwhile.
      SandboxLost: the sandbox died.
    """
    return transfer.read_file(self, path, max_bytes)

  def upload(
    self,
    local: str | os.PathLike[str],
    remote: str,
    *,
    owner: str = "agent",
    resume: bool = False,
    sha256: str | None = None,
  ) -> trees.Transfer:
    """Copies a file or a directory of the host into the sandbox; modes are kept, times fixed.

    Directories that are there already stay as they are, files are replaced.

    Args:
      local: on the host; it may hold only files and directories.
      remote: in the sandbox.
      owner: "agent" or "root".
      resume: go on where it stood when a connection breaks, instead of failing.
      sha256: hexadecimal, of a file: one with another is refused before it is in place.

    Raises:
      SandboxError: something cannot be read or written; the message names it.
      SandboxLost: the sandbox died, or without `resume` the connection.
    """
    return trees.upload(self, local, remote, owner, resume, sha256)

  def download(
    self,
    remote: str,
    local: str | os.PathLike[str],
    max_bytes: int = 256 << 20,
    *,
    max_files: int = 100_000,
    sha256: str | None = None,
  ) -> trees.Transfer:
    """Copies a file or a directory of the sandbox to the host, whole or not at all.

    Times are kept, modes too but for setuid, setgid and sticky bits; whatever is no file and no
    directory is left out and told in the result. Nothing that lies at `local` is overwritten.

    Args:
      remote: path in the sandbox.
      local: path on the host, which must not exist.
      max_bytes: of all files together. An agent can make small disks hold huge, sparse files.
      max_files: names of all kinds in a directory.
      sha256: hexadecimal, as in the result: another is refused and nothing stays.

    Raises:
      SandboxError: it cannot be read, changed meanwhile, or exceeds a limit; the message names it.
      FileExistsError: `local` exists.
    """
    return trees.download(self, remote, local, max_bytes, max_files, sha256)

  def open_upload(self, remote: str, mode: int = 0o644, owner: str = "agent") -> transfer.Upload:
    """Begins an upload in parts.

    Raises:
      SandboxError: the place cannot be written.
      SandboxLost: the sandbox died.
    """
    return transfer.open_upload(self, remote, mode, owner)

  def open_download(self, remote: str) -> transfer.Download:
    """Opens a regular file for reading in parts; symbolic links are refused.

    Raises:
      SandboxError: there is none, or it is no regular file.
      SandboxLost: the sandbox died.
    """
    return transfer.open_download(self, remote)

  def lstat(self, path: str) -> transfer.FileStat:
    """What lies at a path, without following a symbolic link. Raises SandboxError if nothing."""
    return transfer.lstat(self, path)

  def remove(self, path: str, timeout: float = 60.0) -> None:
    """Removes a file, or a directory with all it holds; never follows symbolic links.

    Raises:
      SandboxError: there is none, or something in it cannot be removed in `timeout` seconds.
    """
    transfer.remove(self, path, timeout)

  def verify(self, script: str, timeout: float = 60.0) -> CommandResult:
    """Ends every process of the agent, then runs a bash script as root in the work directory.

    The environment is clean, and nothing of the agent runs meanwhile. The sessions' shells end;
    their next command finds new ones.

    Raises:
      SandboxLost: the sandbox died.
    """
    if "\0" in script:
      raise ValueError("a script cannot hold a NUL character")
    return self._execute(self._connection(), client.VERIFY, script, timeout)

  def reset(self, timeout: float = 20.0) -> None:
    """Makes the sandbox as new: no processes, no IPC objects, no files, a fresh session.

    Raises:
      SandboxLost: it could not be done; the sandbox must not be used again.
    """
    try:
      self._call(self._connection(), client.RESET, timeout=timeout)
    except client.RequestError as error:
      raise SandboxLost(f"sandbox {self.id}: {error}") from error

  def stats(self) -> dict[str, int]:
    """Returns counts: processes, sessions, bytes used in the work directory and in /tmp."""
    text = self._call(self._connection(), client.INFO).data.decode()
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}

  def alive(self) -> bool:
    """Whether the sandbox answers."""
    try:
      self.stats()
    except SandboxError:
      return False
    return True

  @property
  def pid(self) -> int:
    """The host's pid of rocklet, whose end is the end of the sandbox. Raises SandboxLost."""
    self._connection()
    assert self._launched is not None
    return self._launched.pid

  def lost_reason(self) -> str:
    """Why it ended, as far as the host knows; meaningful once it has. May ask the backend."""
    return (self._launched.reason() if self._launched else "") or "it ended by itself"

  def close(self) -> None:
    """Ends the sandbox and removes all it had. Idempotent."""
    close_all([self])

  def __enter__(self) -> "Sandbox":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()

  def _connect(self, timeout: float) -> client.Connection:
    return client.Connection(str(self._home / "sock"), timeout)

  def _connection(self) -> client.Connection:
    if self._closed or self._main is None:
      raise SandboxLost(f"sandbox {self.id} is closed")
    return self._main

  def _call(self, connection: client.Connection, op: int, *args, **kwargs) -> client.Reply:  # type: ignore[no-untyped-def]
    """A call whose loss names this sandbox and what the host knows of its end."""
    try:
      return connection.call(op, *args, **kwargs)
    except SandboxLost as error:
      if self._closed:
        raise SandboxLost(f"sandbox {self.id} is closed") from error
      reason = self._launched.reason() if self._launched else "it did not start"
      raise SandboxLost(f"sandbox {self.id} ({self.backend}) is lost: {reason}") from error

  def _execute(
    self, connection: client.Connection, op: int, text: str, timeout: float
  ) -> CommandResult:
    if not 0 < timeout <= 86400:
      raise ValueError(f"timeout must be between 0 and 86400 seconds, not {timeout}")
    data = text.encode("utf-8", "surrogateescape")
    start = time.perf_counter()
    try:
      reply = self._call(connection, op, "", data, timeout=timeout)
    except client.RequestError as error:
      raise SandboxLost(f"sandbox {self.id}: {error}") from error
    timed_out = bool(reply.flags & client.TIMED_OUT)
    return CommandResult(
      None if timed_out else reply.exit_code,
      reply.data.decode("utf-8", "replace"),
      timed_out,
      bool(reply.flags & client.TRUNCATED),
      time.perf_counter() - start,
    )


def make_sandbox(
  image: str | None = None,
  backend: str = "auto",
  *,
  limits: Limits | None = None,
  accept_no_isolation: bool = False,
) -> Sandbox:
  """Starts a sandbox.

  Args:
    image: a local image that holds bash; None for the base image, which is built if need be.
    backend: "podman", "bubblewrap", "process", or "auto": Podman where it can run, else bubblewrap.
    limits: upper bounds, `Limits()` by default.
    accept_no_isolation: must be True for "process".

  Raises:
    ValueError: there is no such backend.
    BackendUnavailable: the backend cannot run here; the message says what to install.
    ImageError: the image is not here, cannot be built or holds no bash.
    SandboxLost: the sandbox did not start.
  """
  if backend not in (*BACKENDS, "auto"):
    raise ValueError(f"backend {backend!r} is none of auto, {', '.join(BACKENDS)}")
  if backend == "process" and not accept_no_isolation:
    raise BackendUnavailable(
      "the process backend isolates nothing: the agent's commands run as you, on this machine; "
      "if you mean it, say --sandbox=process --i_accept_no_isolation"
    )
  prepare_process()
  return Sandbox(_choose(backend), image, limits or Limits())


def _choose(name: str) -> Backend:
  if name != "auto":
    BACKENDS[name].probe()
    return BACKENDS[name]
  reasons = []
  for candidate in ("podman", "bubblewrap"):
    try:
      BACKENDS[candidate].probe()
      return BACKENDS[candidate]
    except BackendUnavailable as error:
      reasons.append(str(error))
  raise BackendUnavailable("no sandbox can run here. " + "; or ".join(reasons))
