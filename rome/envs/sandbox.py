"""A sandbox: an unprivileged shell, files and a verifier behind one small class.

`Sandbox` speaks to the rocklet inside; the backends differ only in how they start one. The default
session lives on the connection that also owns the sandbox: when it closes, by `close` or by the
death of this process, the sandbox ends.

Elsewhere: many sandboxes (`manager.py`, `fleet.py`), images by recipe (`hub.py`), tar archives
(`archives.py`), and the same interface over HTTP (`remote.py`).
"""

import os
import secrets
import threading
import time
from collections.abc import Mapping
from types import TracebackType

from rome.envs import owner, transfer, trees
from rome.envs import snapshot as snapshots
from rome.envs.backends import Backend, Launched
from rome.envs.backends.podman import Podman
from rome.envs.channel import channel
from rome.envs.common import (
  BackendUnavailable,
  CommandResult,
  HostDirectory,
  ImageError,
  Limits,
  SandboxError,
  SandboxLost,
)
from rome.envs.live import BACKENDS, close_all, enter, prepare_process, sweep
from rome.envs.network.attempts import Attempt, EgressLog
from rome.envs.network.link import Link
from rome.envs.network.policy import NetworkPolicy
from rome.envs.rocklet import client
from rome.envs.session import Session, command_result
from rome.envs.snapshot import Snapshot

__all__ = [
  "BACKENDS",
  "BackendUnavailable",
  "CommandResult",
  "HostDirectory",
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
    limits: its upper bounds.
    network: what it may reach; None for nothing but its own loopback.
  """

  def __init__(
    self,
    backend: Backend,
    image: str | None,
    limits: Limits,
    network: NetworkPolicy | None = None,
    directory: HostDirectory | None = None,
  ):
    self.id = f"rome-{secrets.token_hex(6)}"
    self.backend = backend.name
    self.image = backend.image(image)
    self.limits = limits
    self._backend = backend
    self._closed = False
    self._home = owner.new_dir(self.id)
    self._launched: Launched | None = None
    self._main: client.Connection | None = None
    self._idle: list[client.Connection] = []  # for files; see channel.py
    self._network = network
    self._directory = directory
    self._link = Link(self)
    enter(self)
    try:
      self._launched = backend.launch(self.id, self.image, limits, self._home, directory)
      self.workdir = self._launched.workdir
      self._main = self._connect(START_TIMEOUT)
      self._idle.append(self._connect(START_TIMEOUT))
      if not self.stats()["bash"]:
        raise ImageError(f"image {self.image!r} holds no bash: add bash to it")
      if network is not None:
        self._link.open(network)
      self._session = Session(
        self, self._main, "main", env=self._variables()
      )  # its shell warms up meanwhile
    except BaseException:
      self.close()
      raise

  def run(self, command: str, timeout: float = 10.0) -> CommandResult:
    """Runs a command in the default session; see `Session.run`."""
    return self._session.run(command, timeout)

  def interrupt_with(self, event: threading.Event | None) -> None:
    """From now on `run` stops its command, as at a deadline, once the event is set."""
    self._session.interrupt = event

  def session(
    self,
    name: str,
    *,
    user: str | int = "agent",
    pty: tuple[int, int] | None = None,
    cwd: str = "",
    env: Mapping[str, str] | None = None,
    state: bytes = b"",
  ) -> Session:
    """Opens an independent session; at most 64 can be open, the default one included.

    Args:
      name: for people; need not be unique.
      user: "agent", "root", or a uid from 1000 to 65533. A uid that is not the agent's gets a
        home, /home/UID, that only it can enter. Users can touch neither each other's processes nor
        sessions. Sandboxes with one user (see the backends) have the agent only.
      pty: rows and columns of a terminal; None for pipes, with a closed stdin.
      cwd: where it starts; by default the work directory, or the home of a user of its own.
      env: variables beside, or instead of, those that every shell has.
      state: what `Session.state` told of another session.

    Raises:
      SandboxError: the user cannot be had here, or too many sessions are open.
      SandboxLost: the sandbox died.
    """
    connection = self._connect(START_TIMEOUT)
    try:
      variables = {**self._variables(), **(env or {})}
      return Session(
        self, connection, name, user=user, pty=pty, cwd=cwd, env=variables, state=state
      )
    except SandboxLost as error:
      connection.close()
      if not self._answers():
        raise
      raise SandboxError(
        f"session {name!r} of sandbox {self.id} does not start, though the sandbox lives: there is "
        "no room for its processes; close sessions, end processes or raise Limits.pids"
      ) from error
    except BaseException:
      connection.close()
      raise

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

    The environment is clean, the home an empty directory, and nothing of the agent runs meanwhile.
    Where root inside may have changed programs (a root session was open, a snapshot was restored,
    or another script ran since the last reset), the script sees the image's own /bin, /sbin, /usr,
    /lib, and of /etc the settings of the loader, of OpenSSL, Git, Python, Perl and Java and the
    alternatives, in the place of the agent's, so that nobody can replace bash and forge a verdict.
    What the script itself runs or imports from the work directory is the agent's, and runs as root
    too: it can read the script, though not change it, and stop it; run such programs as the agent
    where the task allows. The sessions' shells end; their next command finds new ones.

    Raises:
      SandboxLost: the sandbox died.
    """
    if "\0" in script:
      raise ValueError("a script cannot hold a NUL character")
    if not 0 < timeout <= 86400:
      raise ValueError(f"timeout must be between 0 and 86400 seconds, not {timeout}")
    data = script.encode("utf-8", "surrogateescape")
    start = time.perf_counter()
    try:
      reply = self._call(self._connection(), client.VERIFY, "", data, timeout=timeout)
    except client.RequestError as error:
      raise SandboxLost(f"sandbox {self.id}: {error}") from error
    return command_result(reply, reply.data, start)

  def reset(self, timeout: float = 20.0) -> None:
    """Makes the sandbox as new: no processes, no IPC objects, no files, a fresh session.

    Raises:
      SandboxLost: it could not be done; the sandbox must not be used again.
    """
    self._own("reset")
    try:
      self._call(self._connection(), client.RESET, timeout=timeout)
    except client.RequestError as error:
      raise SandboxLost(f"sandbox {self.id}: {error}") from error
    self._link.reset()

  # --- snapshots and forks (snapshot.py) ---

  def snapshot(self, timeout: float = 60.0) -> Snapshot:
    """Takes all that differs from the image, and the state of the default session.

    All processes are halted meanwhile and go on afterwards. They are no part of the snapshot, nor
    is /dev/shm; `Snapshot.lost` names them.

    Raises:
      SandboxError: a command of the default session runs, or a process cannot be halted.
      SandboxLost: the sandbox died.
    """
    self._own("snapshot")
    return snapshots.take(self, timeout)

  def restore(self, snapshot: Snapshot, timeout: float = 60.0) -> None:
    """Makes this sandbox what the snapshot's was; whatever it held before is gone.

    Raises:
      ValueError: it runs another image.
      SandboxError: the snapshot is damaged or does not fit on the disk. The sandbox is empty then.
      SnapshotError: what was restored differs from the snapshot; the sandbox must not be used.
      SandboxLost: the sandbox died.
    """
    self._own("restore")
    snapshots.restore(self, snapshot, timeout)
    self._link.name_servers()

  def fork(self, into: "Sandbox | None" = None, timeout: float = 60.0) -> "Sandbox":
    """Makes a second sandbox with the same files and the same default session.

    Processes, background jobs among them, do not run in the fork; see `snapshot`. To fork many
    times, take one snapshot and restore it into each. The digest of the fork's own snapshot is
    compared.

    Args:
      into: a sandbox of the same image to use, from a pool for one; None starts one.
      timeout: seconds for the snapshot and for the restore each.

    Raises:
      SandboxError: see `snapshot` and `restore`.
    """
    snapshot = self.snapshot(timeout)
    other = into or self.twin(self._network)
    try:
      other.restore(snapshot, timeout)
    except BaseException:
      if into is None:
        other.close()
      raise
    return other

  def commit(self, tag: str, timeout: float = 60.0) -> str:
    """Makes an image of the files as they are, with the name `localhost/TAG`; returns that name.

    Nothing of the sandbox runs while the image is made: the snapshot is restored in a container of
    the same image that rocklet alone is in. Sessions are not in an image.

    Raises:
      SandboxError: the backend has no images, or Podman refuses; or files with holes are longer
        together than twice `Limits.disk_mb`, since an image keeps no holes.
    """
    self._own("commit")
    if not isinstance(self._backend, Podman):
      raise SandboxError(f"commit: the {self.backend} backend has no images; use podman")
    spool = snapshots.Spool()
    snapshots.stream(self, spool.add, timeout)
    return self._backend.commit(self.image, tag, self.limits, spool.finish(), timeout)

  def twin(self, network: NetworkPolicy | None = None) -> "Sandbox":
    """Starts an empty sandbox of the same image and limits."""
    return Sandbox(self._backend, self.image, self.limits, network)

  def stats(self) -> dict[str, int]:
    """Returns counts: processes, sessions, bytes on the disk (see `Limits.disk_mb`).

    "session NAME" is 1 for each session that runs a command, and 0 for the others.
    """
    text = self._call(self._connection(), client.INFO).data.decode()
    return {
      name: int(value) for name, value in (line.rsplit(" ", 1) for line in text.split("\n") if line)
    }

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

  # Network. With a policy, a connection of its own serves it, so that it never waits for a command.

  @property
  def network(self) -> NetworkPolicy | None:
    """The policy, fixed at the start."""
    return self._network

  @property
  def episode(self) -> str:
    """The label of attempts from now on."""
    return self._link.log.episode

  @episode.setter
  def episode(self, label: str) -> None:
    self._link.collect_direct()  # those of before keep the label of before
    self._link.log.episode = label

  def attempts(self) -> list[Attempt]:
    """What was tried to reach since the start or the last reset, in order of time.

    Without a policy there are only direct attempts. Of a sandbox that is lost, what was known.
    """
    self._link.collect_direct()
    return self._link.log.attempts()

  def log_attempts(self, log: EgressLog | None) -> None:
    """Writes each attempt from now on to a file, too: when it ends, or here for direct ones."""
    self._link.log.file = log

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

  def _answers(self) -> bool:
    """Whether it lives; unlike `alive` this does not wait for the default session's command."""
    try:
      with channel(self) as lent:
        self._call(lent.connection, client.INFO)
    except SandboxError:
      return False
    return True

  def _variables(self) -> dict[str, str]:
    assert self._launched is not None
    return {**self._launched.variables, **self._link.variables}

  def _own(self, what: str) -> None:
    """Refuses what would empty, copy or replace the user's directory."""
    if self._directory is not None:
      raise SandboxError(f"{what}: this sandbox works in {self._directory.path!r}, which it keeps")

  def _connect(self, timeout: float) -> client.Connection:
    try:
      return client.Connection(str(self._home / "sock"), timeout)
    except SandboxLost as error:
      if self._main is None:  # it is only starting
        raise
      raise self._is_lost() from error

  def _connection(self) -> client.Connection:
    if self._closed or self._main is None:
      raise SandboxLost(f"sandbox {self.id} is closed")
    return self._main

  def _call(self, connection: client.Connection, op: int, *args, **kwargs) -> client.Reply:  # type: ignore[no-untyped-def]
    """A call whose loss names this sandbox and what the host knows of its end."""
    try:
      return connection.call(op, *args, **kwargs)
    except SandboxLost as error:
      raise self._is_lost() from error

  def _is_lost(self) -> SandboxLost:
    if self._closed:
      return SandboxLost(f"sandbox {self.id} is closed")
    reason = self._launched.reason() if self._launched else "it did not start"
    return SandboxLost(f"sandbox {self.id} ({self.backend}) is lost: {reason}")


def make_sandbox(
  image: str | None = None,
  backend: str = "auto",
  *,
  limits: Limits | None = None,
  network: NetworkPolicy | None = None,
  accept_no_isolation: bool = False,
  directory: HostDirectory | None = None,
) -> Sandbox:
  """Starts a sandbox.

  Args:
    image: a local image that holds bash; None for the base image, which is built if need be.
    backend: "podman", "bubblewrap", "process", or "auto": Podman where it can run, else bubblewrap.
    limits: upper bounds, `Limits()` by default.
    network: what the sandbox may reach; None, the default, for nothing but its own loopback.
    accept_no_isolation: must be True for "process".
    directory: a directory of the host to work in, which outlives the sandbox; None for one of the
      sandbox's own. In bubblewrap the host's programs are there instead of the base image's
      (`backends/host.py`); in a container it is /work.

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
  if backend == "process" and network is not None:
    raise BackendUnavailable(
      "the process backend shares this machine's network, so no policy can hold: "
      "use podman or bubblewrap"
    )
  prepare_process()
  return Sandbox(_choose(backend), image, limits or Limits(), network, directory)


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
