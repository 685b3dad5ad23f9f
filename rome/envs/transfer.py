"""Files of a sandbox: whole ones, and handles that move large ones in parts.

Transfers have connections of their own, so a command that runs never delays them; one is opened
with the sandbox and kept, as a fork bomb could keep rocklet from serving a new one. No symbolic
link is ever followed in the sandbox, at no place of a path. `trees.py` moves trees with these.

Left out: appending to and changing files in place.
"""

import contextlib
import dataclasses
import errno
import hashlib
import os
import secrets
import stat as stat_lib
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rome.envs.common import SandboxError
from rome.envs.rocklet import client

if TYPE_CHECKING:
  from rome.envs.sandbox import Sandbox

PART = 1 << 20  # bytes that travel at once; what a transfer needs in memory is a few of them
FIXED_MTIME_NS = 1577836800 * 10**9  # 2020-01-01: listings do not tell when an episode ran

_UPLOAD, _RESUME, _WHOLE, _DIRECTORY = 1, 2, 4, 8
_ARGS = struct.Struct("<IIQq32s")  # flags, length, offset, mtime in ns, token
_STAT = struct.Struct("<4I3Qq")  # mode, uid, gid, links, size, blocks, device, mtime in ns
_ANY_SIZE = (1 << 64) - 1
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


def _unpack_stat(data: bytes) -> FileStat:
  mode, uid, gid, _, size, blocks, device, mtime = _STAT.unpack_from(data)
  kinds = {stat_lib.S_IFREG: "file", stat_lib.S_IFDIR: "directory", stat_lib.S_IFLNK: "link"}
  kind = kinds.get(stat_lib.S_IFMT(mode), "other")
  return FileStat(kind, stat_lib.S_IMODE(mode), uid, gid, size, blocks, device, mtime)


def _wire_name(sandbox: "Sandbox", path: str) -> str:
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
    name = _wire_name(self.sandbox, path)
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
    self.request(client.FILE_OPEN, path, flags=_DIRECTORY, mode=mode, owner=owner)

  def put(self, path: str, data: bytes, mode: int, owner: str, mtime_ns: int) -> None:
    """Writes a small file, at most a few MiB, in one exchange."""
    self.request(
      client.FILE_OPEN,
      path,
      data,
      flags=_UPLOAD | _WHOLE,
      token=secrets.token_hex(16),
      mode=mode,
      owner=owner,
      mtime_ns=mtime_ns,
    )

  def lstat(self, path: str) -> FileStat:
    return _unpack_stat(self.request(client.STAT, path).data)

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

  def open_download(self, path: str, max_bytes: int = _ANY_SIZE) -> "Download":
    return Download(self, path, max_bytes)

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


class Upload:
  """A file on its way into a sandbox; made by `open_upload`. As a context manager it is dropped
  unless it was finished.

  Nothing is seen of it in the sandbox before `finish`, but for a hidden name that only root can
  open. Where its connection breaks, it waits 60 seconds for `resume` before it is dropped.

  Attributes:
    path: where it will lie.
    offset: bytes that have arrived; the next `write` goes there.
  """

  def __init__(self, sandbox: "Sandbox", path: str, mode: int, owner: str, mtime_ns: int):
    self.path = path
    self.offset = 0
    self._token = secrets.token_hex(16)
    self._sha256 = hashlib.sha256()
    self._unconfirmed = b""
    self._over = False
    self._channel = Channel(sandbox, sandbox._connect(5.0))
    try:
      self._channel.request(
        client.FILE_OPEN,
        path,
        flags=_UPLOAD,
        token=self._token,
        mode=mode,
        owner=owner,
        mtime_ns=mtime_ns,
      )
    except BaseException:
      self._channel.close()
      raise

  def write(self, data: bytes) -> None:
    """Adds bytes.

    Raises:
      SandboxError: they were refused; the disk may be full.
      SandboxLost: the connection broke: `resume`, then go on at `offset`; or the sandbox died.
    """
    for at in range(0, len(data), PART):
      part = data[at : at + PART]
      self._unconfirmed = part
      reply = self._channel.request(client.FILE_WRITE, self.path, part, offset=self.offset)
      if reply.flags & client.MISPLACED:
        raise SandboxError(f"{self.path!r} holds {reply.total} bytes already, not {self.offset}")
      self._confirm()

  def _confirm(self) -> None:
    self._sha256.update(self._unconfirmed)
    self.offset += len(self._unconfirmed)
    self._unconfirmed = b""

  def resume(self) -> None:
    """Takes the upload up again on a new connection; `offset` then says where to go on.

    Raises:
      SandboxError: it is no longer there: the bound is over, or it was finished or reset.
      SandboxLost: the sandbox died.
    """
    self._channel.reconnect()
    reply = self._channel.request(
      client.FILE_OPEN, self.path, flags=_UPLOAD | _RESUME, token=self._token
    )
    if reply.total == self.offset + len(self._unconfirmed):
      self._confirm()
    elif reply.total != self.offset:
      raise SandboxError(f"{self.path!r} holds {reply.total} bytes, not {self.offset}: drop it")

  def finish(self, sha256: str | None = None) -> str:
    """Puts the file in its place, whole, and replaces what lay there. Returns its sha256.

    Args:
      sha256: hexadecimal; where the bytes' own is another, the upload is dropped.

    Raises:
      SandboxError: the digest is another, or the place is not what it was.
      SandboxLost: the connection broke; whether the file is in place is not known.
    """
    digest = self._sha256.hexdigest()
    if sha256 is not None and sha256.lower() != digest:
      self.drop()
      raise SandboxError(f"{self.path!r} has sha256 {digest}, not {sha256}: it was dropped")
    self._channel.request(client.FILE_FINISH, self.path, offset=self.offset)
    self._over = True
    self._channel.close()
    return digest

  def drop(self) -> None:
    """Removes what has arrived. Idempotent; nothing happens after `finish`."""
    if not self._over:
      self._over = True
      with contextlib.suppress(SandboxError):  # rocklet drops it by itself in time
        self._channel.request(client.FILE_DROP, self.path)
      self._channel.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.drop()


class Download:
  """A file of a sandbox that is open for reading; made by `open_download`. A context manager.

  It stays the same file, wherever its name goes. Where it shrinks, grows or is written to, reading
  its end fails; nothing is ever filled up.

  Attributes:
    path: its name when it was opened.
    stat: what it was then; `size` is short for `stat.size`.
  """

  def __init__(self, lent: Channel, path: str, max_bytes: int, *, owned: bool = False):
    self.path = path
    self._channel = lent
    self._owned = owned
    reply = lent.request(client.FILE_OPEN, path, length=PART, offset=min(max_bytes, _ANY_SIZE))
    self.stat = _unpack_stat(reply.data)
    self.size = self.stat.size
    self._first = reply.data[_STAT.size :]

  def read(self, offset: int, n: int) -> bytes:
    """Returns up to `n` bytes from `offset`, fewer only at the end; at most 4 MiB.

    Raises:
      SandboxError: the file is not what it was, or the offset lies beyond its end.
      SandboxLost: the connection broke; a new download can go on at any offset.
    """
    if offset + n <= len(self._first) or len(self._first) == self.size >= offset:
      return self._first[offset : offset + n]
    n = min(n, 4 * PART)
    return self._channel.request(client.FILE_READ, self.path, length=n, offset=offset).data

  def parts(self) -> Iterator[bytes]:
    """Yields the whole content in order."""
    at = 0
    while at < self.size:
      part = self.read(at, PART)
      at += len(part)
      yield part

  def close(self) -> None:
    """Lets go of the file. Idempotent."""
    if self._owned:
      self._channel.close()
    elif len(self._first) < self.size:
      with contextlib.suppress(SandboxError):
        self._channel.request(client.FILE_DROP, self.path)

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()


def open_upload(
  sandbox: "Sandbox",
  remote: str,
  mode: int = 0o644,
  owner: str = "agent",
  mtime_ns: int = FIXED_MTIME_NS,
) -> Upload:
  """Begins an upload, on a connection of its own. See `Sandbox.open_upload`."""
  sandbox._connection()
  return Upload(sandbox, remote, mode, owner, mtime_ns)


def open_download(sandbox: "Sandbox", remote: str, max_bytes: int = _ANY_SIZE) -> Download:
  """Opens a file for reading, on a connection of its own. See `Sandbox.open_download`."""
  sandbox._connection()
  own = Channel(sandbox, sandbox._connect(5.0))
  try:
    return Download(own, remote, max_bytes, owned=True)
  except BaseException:
    own.close()
    raise


def write_file(sandbox: "Sandbox", path: str, data: bytes, mode: int, owner: str) -> None:
  """See `Sandbox.write_file`."""
  if len(data) <= PART:
    with channel(sandbox) as lent:
      lent.put(path, data, mode, owner, FIXED_MTIME_NS)
    return
  with open_upload(sandbox, path, mode, owner) as upload:
    upload.write(data)
    upload.finish()


def read_file(sandbox: "Sandbox", path: str, max_bytes: int) -> bytes:
  """See `Sandbox.read_file`."""
  with channel(sandbox) as lent, lent.open_download(path, max_bytes) as download:
    return b"".join(download.parts())


def lstat(sandbox: "Sandbox", path: str) -> FileStat:
  """See `Sandbox.lstat`."""
  with channel(sandbox) as lent:
    return lent.lstat(path)


def remove(sandbox: "Sandbox", path: str, timeout: float) -> None:
  """See `Sandbox.remove`."""
  if _wire_name(sandbox, path).strip("/.") == "":
    raise SandboxError(f"path {path!r} is the work directory: reset empties it")
  with channel(sandbox) as lent:
    lent.request(client.REMOVE, path, timeout=timeout)
