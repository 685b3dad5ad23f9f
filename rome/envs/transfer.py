"""Files of a sandbox: whole ones, and handles that move large ones in parts.

No symbolic link is ever followed in the sandbox, at no place of a path. `trees.py` moves trees with
these parts, `archives.py` archives.

Left out: appending to and changing files in place.
"""

import contextlib
import hashlib
import secrets
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rome.envs.channel import (
  ANY_SIZE,
  FIXED_MTIME_NS,
  PART,
  RESUME,
  STAT_HEAD,
  UPLOAD,
  Channel,
  FileStat,
  channel,
  unpack_stat,
  wire_name,
)
from rome.envs.common import SandboxError
from rome.envs.rocklet import client

if TYPE_CHECKING:
  from rome.envs.sandbox import Sandbox


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
        flags=UPLOAD,
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
      client.FILE_OPEN, self.path, flags=UPLOAD | RESUME, token=self._token
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
    reply = lent.request(client.FILE_OPEN, path, length=PART, offset=min(max_bytes, ANY_SIZE))
    self.stat = unpack_stat(reply.data)
    self.size = self.stat.size
    self._first = reply.data[STAT_HEAD.size :]

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


def open_download(sandbox: "Sandbox", remote: str, max_bytes: int = ANY_SIZE) -> Download:
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
  with channel(sandbox) as lent, Download(lent, path, max_bytes) as download:
    return b"".join(download.parts())


def lstat(sandbox: "Sandbox", path: str) -> FileStat:
  """See `Sandbox.lstat`."""
  with channel(sandbox) as lent:
    return lent.lstat(path)


def remove(sandbox: "Sandbox", path: str, timeout: float) -> None:
  """See `Sandbox.remove`."""
  if wire_name(sandbox, path).strip("/.") == "":
    raise SandboxError(f"path {path!r} is the work directory: reset empties it")
  with channel(sandbox) as lent:
    lent.request(client.REMOVE, path, timeout=timeout)
