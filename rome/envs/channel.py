"""Connections for files, and the small requests on them: what lies at a path, lists, directories.

Transfers have connections of their own, so a command that runs never delays them; one is opened
with the sandbox and kept, as a fork bomb could keep rocklet from serving a new one.
"""

import contextlib
import dataclasses
import errno
import os
import secrets
import stat as stat_lib
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rome.envs.common import SandboxError
from rome.envs.rocklet import client

if TYPE_CHECKING:
  from rome.envs.sandbox import Sandbox

PART = 1 << 20  # bytes that travel at once; what a transfer needs in memory is a few of them
FIXED_MTIME_NS = 1577836800 * 10**9  # 2020-01-01: listings do not tell when an episode ran

UPLOAD, RESUME, WHOLE, DIRECTORY = 1, 2, 4, 8  # flags of FILE_OPEN
_ARGS = struct.Struct("<IIQq32s")  # flags, length, offset, mtime in ns, token
STAT_HEAD = struct.Struct("<4I3Qq")  # mode, uid, gid, links, size, blocks, device, mtime in ns
ANY_SIZE = (1 << 64) - 1
_HINTS = {
  errno.ELOOP: "it is a symbolic link, or one lies on the way",
  errno.ENOTDIR: "what lies on the way is a symbolic link or no directory",
  errno.EINVAL: "it is no regular file",
  errno.ENXIO: "it is no regular file",
  errno.EPERM: "another name of a file that the agent may not read",
  errno.EAGAIN: "a process in the sandbox holds a lease on it",
  errno.ESTALE: "it was changed, moved or replaced meanwhile",
  errno.EFBIG: "it is larger than the limit given",
  errno.E2BIG: "the directory holds more entries than the limit given",
}


@dataclasses.dataclass(frozen=True)
class FileStat:
  """What a name in a sandbox stands for; a symbolic link stands for itself.

  Attributes:
    kind: "file", "directory", "link" or "other".
    mode: permission bits, setuid, setgid and sticky among them.
    uid, gid: the owner, as the sandbox counts.
    size: bytes.
    blocks: of 512 bytes, that it takes up; a sparse file has few.
    device: number of the file system it lies on.
    mtime_ns: last change of its content, nanoseconds since 1970.
  """

  kind: str
  mode: int
  uid: int
  gid: int
  size: int
  blocks: int
  device: int
  mtime_ns: int


def unpack_stat(data: bytes) -> FileStat:
  mode, uid, gid, _, size, blocks, device, mtime = STAT_HEAD.unpack_from(data)
  kinds = {stat_lib.S_IFREG: "file", stat_lib.S_IFDIR: "directory", stat_lib.S_IFLNK: "link"}
  kind = kinds.get(stat_lib.S_IFMT(mode), "other")
  return FileStat(kind, stat_lib.S_IMODE(mode), uid, gid, size, blocks, device, mtime)


def wire_name(sandbox: "Sandbox", path: str) -> str:
  """Checks a path and makes it relative to the work directory where it lies there."""
  if "\0" in path or ".." in path.split("/") or not path.strip("/"):
    raise SandboxError(f"path {path!r} must name something, without '..' and NUL")
  if len(os.fsencode(path)) > client.MAX_NAME:
    raise SandboxError(f"path {path[:80]!r}… is more than allowed: {client.MAX_NAME} bytes")
  name = path.removeprefix(sandbox.workdir + "/") if path != sandbox.workdir else "."
  if sandbox.backend == "process" and name.startswith("/"):
    raise SandboxError(f"path {path!r} lies outside the work directory {sandbox.workdir}")
  return name


class Channel:
  """A connection for files, lent by `channel`. Not thread-safe."""

  def __init__(self, sandbox: "Sandbox", connection: client.Connection):
    self.sandbox = sandbox
    self.connection = connection

  def request(
    self,
    op: int,
    path: str,
    data: bytes = b"",
    *,
    flags: int = 0,
    length: int = 0,
    offset: int = 0,
    mtime_ns: int = FIXED_MTIME_NS,
    token: str = "",
    mode: int = 0,
    owner: str = "agent",
    timeout: float = 60.0,
  ) -> client.Reply:
    """Sends one request about `path`.

    Raises:
      client.RequestError: it was refused; the message names the path.
      SandboxLost: the connection broke.
    """
    if owner not in ("agent", "root"):
      raise ValueError(f"owner must be 'agent' or 'root', not {owner!r}")
    name = wire_name(self.sandbox, path)
    if op in (client.LIST, client.STAT, client.REMOVE):
      payload = data
    else:
      payload = _ARGS.pack(flags, length, offset, mtime_ns, token.encode()) + data
    try:
      return self.sandbox._call(
        self.connection, op, name, payload, timeout=timeout, mode=mode, as_root=owner == "root"
      )
    except client.RequestError as error:
      hint = f" ({_HINTS[error.errno]})" if error.errno in _HINTS else ""
      error.args = (f"sandbox {self.sandbox.id}: {path!r}: {error}{hint}",)
      raise

  def make_dir(self, path: str, mode: int = 0o755, owner: str = "agent") -> None:
    """Makes a directory and those above it; one that is there stays as it is."""
    self.request(client.FILE_OPEN, path, flags=DIRECTORY, mode=mode, owner=owner)

  def put(self, path: str, data: bytes, mode: int, owner: str, mtime_ns: int) -> None:
    """Writes a small file, at most a few MiB, in one exchange."""
    self.request(
      client.FILE_OPEN,
      path,
      data,
      flags=UPLOAD | WHOLE,
      token=secrets.token_hex(16),
      mode=mode,
      owner=owner,
      mtime_ns=mtime_ns,
    )

  def lstat(self, path: str) -> FileStat:
    return unpack_stat(self.request(client.STAT, path).data)

  def list(self, path: str, max_entries: int) -> tuple[list[tuple[str, int, str]], int]:
    """Returns (kind, mode, name) of each entry, sorted, and the device; kinds are f, d, l and o."""
    reply = self.request(client.LIST, path, mode=max(max_entries, 1))
    entries = []
    for raw in reply.data.split(b"\0")[:-1]:
      kind, mode, name = raw.split(b" ", 2)
      if name in (b"", b".", b"..") or b"/" in name:
        raise SandboxError(f"sandbox {self.sandbox.id}: {path!r} holds an impossible name {name!r}")
      entries.append((kind.decode(), int(mode, 8), os.fsdecode(name)))
    return sorted(entries, key=lambda entry: os.fsencode(entry[2])), reply.total

  def reconnect(self) -> None:
    """Begins anew on another connection, where this one broke. Raises SandboxLost."""
    self.close()
    self.connection = self.sandbox._connect(5.0)

  def close(self) -> None:
    self.connection.close()


@contextlib.contextmanager
def channel(sandbox: "Sandbox") -> Iterator[Channel]:
  """Lends the idle connection of the sandbox, or a new one; one that breaks is not used again."""
  sandbox._connection()  # raises where the sandbox is closed
  try:
    connection = sandbox._idle.pop()
  except IndexError:
    connection = sandbox._connect(5.0)
  in_step, lent = False, Channel(sandbox, connection)
  try:
    yield lent
    in_step = True
  except client.RequestError:
    in_step = True
    raise
  finally:
    if in_step and not sandbox._closed and not sandbox._idle:
      sandbox._idle.append(lent.connection)
    else:
      lent.close()
