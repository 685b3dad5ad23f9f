"""Files and whole trees between the host and a sandbox.

What comes out of a sandbox is created below one directory of the host through descriptors, each
name exclusively, and gets its final name only when all is there: no name that the agent chooses can
lead elsewhere, overwrite anything or leave half a tree. Symbolic links, devices, fifos and sockets
are left out and told; other file systems (/proc) are not entered.

Left out: links and sparse files as such (a snapshot keeps both).
"""

import dataclasses
import errno
import hashlib
import os
import pathlib
import secrets
import shutil
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rome.envs.channel import FIXED_MTIME_NS, PART, Channel, channel
from rome.envs.common import SandboxError, SandboxLost
from rome.envs.rocklet import client
from rome.envs.transfer import Download, Upload, open_upload

if TYPE_CHECKING:
  from rome.envs.sandbox import Sandbox

MAX_DEPTH = 256  # of directories in one another
_RESUMES = 5  # of one file, in a row without progress
# What a name may turn into between the listing and the opening; then it is told as left out.
CHANGED = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EINVAL, errno.ENXIO, errno.EISDIR)
_KINDS = {"l": "a symbolic link", "o": "a device, a fifo or a socket"}


@dataclasses.dataclass(frozen=True)
class Transfer:
  """What was copied.

  Attributes:
    files: number of regular files.
    bytes: in them.
    sha256: hexadecimal. Of a single file its content's; of a tree that of its manifest: for each
      entry, sorted by path, `KIND MODE SIZE SHA256 PATH\\0` (kind f or d, mode octal, a directory's
      size and digest `0 -`, paths relative to the top, which is not listed itself).
    skipped: (path, why) of what was left out.
  """

  files: int
  bytes: int
  sha256: str
  skipped: tuple[tuple[str, str], ...] = ()


class Manifest:
  """Collects what a tree holds and gives it a digest; see `Transfer.sha256`."""

  def __init__(self) -> None:
    self._lines: list[tuple[bytes, bytes]] = []
    self._skipped: list[tuple[str, str]] = []
    self.files = 0
    self.bytes = 0

  def add_dir(self, path: str, mode: int) -> None:
    self._lines.append((os.fsencode(path), b"d %o 0 -" % mode))

  def add_file(self, path: str, mode: int, size: int, digest: str) -> None:
    self._lines.append((os.fsencode(path), b"f %o %d %s" % (mode, size, digest.encode())))
    self.files += 1
    self.bytes += size

  def skip(self, path: str, why: str) -> None:
    self._skipped.append((path, why))

  def transfer(self) -> Transfer:
    text = b"".join(b"%s %s\0" % (line, path) for path, line in sorted(self._lines))
    skipped = tuple(sorted(self._skipped))
    return Transfer(self.files, self.bytes, hashlib.sha256(text).hexdigest(), skipped)


@dataclasses.dataclass
class Remote:
  """An entry of a tree in a sandbox: `kind` is f or d, `path` relative to the top."""

  kind: str
  path: str
  mode: int


def walk(lent: Channel, top: str, max_files: int, manifest: Manifest) -> Iterator[Remote]:
  """Yields files and directories below `top`, each directory before what it holds, sorted.

  Everything else is entered in `manifest` as skipped.

  Raises:
    SandboxError: there are more than `max_files` entries, or more than MAX_DEPTH levels.
  """
  count, device = 0, None
  too_many = f"holds more than {max_files} files or 16 MiB of names: raise max_files"
  pending = [Remote("d", "", 0)]
  while pending:
    here = pending.pop()
    if here.path:
      yield here
    if here.kind == "f":
      continue
    full = f"{top}/{here.path}" if here.path else top
    if here.path.count("/") >= MAX_DEPTH:
      raise SandboxError(f"{full[:200]!r}… lies deeper than {MAX_DEPTH} directories: refused")
    try:
      entries, where = lent.list(full, max_files - count)
    except client.RequestError as error:
      if error.errno == errno.E2BIG:
        raise SandboxError(
          f"{full!r} holds more than {max_files} files: raise max_files"
        ) from error
      if not here.path or error.errno not in CHANGED:
        raise
      manifest.skip(here.path, "it changed while the tree was read")
      continue
    device = where if device is None else device
    if where != device:
      manifest.skip(here.path, "it is another file system")
      continue
    count += len(entries)
    if count > max_files:
      raise SandboxError(f"{full!r} {too_many}")
    for kind, mode, name in reversed(entries):
      path = f"{here.path}/{name}" if here.path else name
      if kind in _KINDS:
        manifest.skip(path, _KINDS[kind])
      else:
        pending.append(Remote(kind, path, mode & 0o777))


def download(
  sandbox: "Sandbox",
  remote: str,
  local: str | os.PathLike[str],
  max_bytes: int,
  max_files: int,
  sha256: str | None,
) -> Transfer:
  """See `Sandbox.download`."""
  target = pathlib.Path(os.path.abspath(local))
  with channel(sandbox) as lent:
    is_dir = lent.lstat(remote).kind == "directory"
    parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    name, temp = os.fsencode(target.name), b".rome-%s" % secrets.token_hex(8).encode()
    try:
      if _exists(name, parent):
        raise FileExistsError(errno.EEXIST, "the target of a download exists", str(target))
      fetch = _fetch_tree if is_dir else _fetch_file
      done = fetch(lent, remote, parent, temp, max_bytes, max_files)
      if sha256 is not None and sha256.lower() != done.sha256:
        raise SandboxError(f"{remote!r} has sha256 {done.sha256}, not {sha256}: nothing was kept")
      _reserve(name, parent, is_dir)
      os.rename(temp, name, src_dir_fd=parent, dst_dir_fd=parent)
      return done
    except BaseException:
      _discard(temp, parent)
      raise
    finally:
      os.close(parent)


def _exists(name: bytes, parent: int) -> bool:
  try:
    os.lstat(name, dir_fd=parent)
  except FileNotFoundError:
    return False
  return True


def _reserve(name: bytes, parent: int, is_dir: bool) -> None:
  """Takes a name exclusively, with what a rename may replace. Raises FileExistsError."""
  if is_dir:
    os.mkdir(name, 0o700, dir_fd=parent)
  else:
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=parent))


def _discard(name: bytes, parent: int) -> None:
  try:
    os.unlink(name, dir_fd=parent)
  except IsADirectoryError:
    shutil.rmtree(name, dir_fd=parent)
  except FileNotFoundError:
    pass


def _fetch_file(
  lent: Channel, remote: str, parent: int, name: bytes, max_bytes: int, max_files: int
) -> Transfer:
  del max_files
  _, size, digest = _land(lent, remote, parent, name, max_bytes)
  return Transfer(1, size, digest)


def _land(
  lent: Channel, remote: str, parent: int, name: bytes, max_bytes: int
) -> tuple[int, int, str]:
  """Copies one file of the sandbox to a new name on the host. Returns mode, size and sha256."""
  digest = hashlib.sha256()
  flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
  with Download(lent, remote, max_bytes) as source:
    mode = source.stat.mode & 0o777
    with open(os.open(name, flags, 0o600, dir_fd=parent), "wb", buffering=0) as file:
      for part in source.parts():
        digest.update(part)
        view = memoryview(part)
        while view:
          view = view[file.write(view) :]
      os.fchmod(file.fileno(), mode)
      os.utime(file.fileno(), ns=(source.stat.mtime_ns, source.stat.mtime_ns))
    return mode, source.size, digest.hexdigest()


def _fetch_tree(
  lent: Channel, remote: str, parent: int, name: bytes, max_bytes: int, max_files: int
) -> Transfer:
  manifest = Manifest()
  os.mkdir(name, 0o700, dir_fd=parent)
  top = os.open(name, _DIRECTORY, dir_fd=parent)
  inner, inner_path = os.dup(top), ""
  try:
    for entry in walk(lent, remote, max_files, manifest):
      where, _, leaf = entry.path.rpartition("/")
      if where != inner_path:
        deeper = _descend(top, where)
        os.close(inner)
        inner, inner_path = deeper, where
      encoded = os.fsencode(leaf)
      if entry.kind == "d":
        _make_dir(inner, encoded, entry.mode)
        manifest.add_dir(entry.path, entry.mode)
        continue
      try:
        full = f"{remote}/{entry.path}"
        landed = _land(lent, full, inner, encoded, max_bytes - manifest.bytes)
        manifest.add_file(entry.path, *landed)
      except client.RequestError as error:
        if error.errno not in CHANGED:
          raise
        manifest.skip(entry.path, "it changed while the tree was read")
    return manifest.transfer()
  finally:
    os.close(inner)
    os.close(top)


_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _descend(top: int, path: str) -> int:
  """Opens a directory below `top`, through no link."""
  fd = os.dup(top)
  for name in filter(None, path.split("/")):
    try:
      deeper = os.open(os.fsencode(name), _DIRECTORY, dir_fd=fd)
    finally:
      os.close(fd)
    fd = deeper
  return fd


def _make_dir(parent: int, name: bytes, mode: int) -> None:
  """Makes a directory that its owner can always enter, and so remove."""
  os.mkdir(name, 0o700, dir_fd=parent)
  fd = os.open(name, _DIRECTORY, dir_fd=parent)
  try:
    os.fchmod(fd, mode | 0o700)
  finally:
    os.close(fd)


def upload(
  sandbox: "Sandbox",
  local: str | os.PathLike[str],
  remote: str,
  owner: str,
  resume: bool,
  sha256: str | None,
) -> Transfer:
  """See `Sandbox.upload`."""
  source = pathlib.Path(local)
  kind = _local_kind(source)
  with channel(sandbox) as lent:
    if kind == "f":
      _, size, digest = _send(lent, source, remote, owner, resume, sha256)
      return Transfer(1, size, digest)
    if sha256 is not None:
      raise ValueError(f"upload: {source} is a directory: an expected sha256 needs a single file")
    manifest = Manifest()
    lent.make_dir(remote, source.stat().st_mode & 0o777, owner)
    pending = [(source, "")]
    while pending:
      directory, prefix = pending.pop()
      for child in sorted(directory.iterdir(), key=os.fsencode):
        path = prefix + child.name
        if _local_kind(child) == "d":
          mode = child.stat().st_mode & 0o777
          lent.make_dir(f"{remote}/{path}", mode, owner)
          manifest.add_dir(path, mode)
          pending.append((child, path + "/"))
        else:
          sent = _send(lent, child, f"{remote}/{path}", owner, resume, None)
          manifest.add_file(path, *sent)
    return manifest.transfer()


def _local_kind(path: pathlib.Path) -> str:
  try:
    mode = path.lstat().st_mode
  except OSError as error:
    raise SandboxError(f"upload: {path}: {error.strerror}") from error
  if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
    raise SandboxError(f"upload: {path} is neither a file nor a directory")
  return "f" if stat.S_ISREG(mode) else "d"


def _send(
  lent: Channel, source: pathlib.Path, remote: str, owner: str, resume: bool, sha256: str | None
) -> tuple[int, int, str]:
  """Copies one file of the host into the sandbox. Returns mode, size and sha256."""
  fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
  with open(fd, "rb", buffering=0) as file:
    found = os.fstat(fd)
    mode, size = found.st_mode & 0o777, found.st_size
    if not stat.S_ISREG(found.st_mode):
      raise SandboxError(f"upload: {source} is no regular file any more")
    if size <= PART:
      data = file.read(size + 1)
      digest = hashlib.sha256(data).hexdigest()
      if len(data) != size:
        raise SandboxError(f"upload: {source} changed while it was read")
      if sha256 is not None and sha256.lower() != digest:
        raise SandboxError(f"upload: {source} has sha256 {digest}, not {sha256}: it was not sent")
      try:
        lent.put(remote, data, mode, owner, FIXED_MTIME_NS)
      except SandboxLost:
        if not resume:
          raise
        lent.reconnect()
        lent.put(remote, data, mode, owner, FIXED_MTIME_NS)
      return mode, size, digest
    sending: Upload = open_upload(lent.sandbox, remote, mode, owner)
    with sending:
      stalled = 0
      while part := os.pread(fd, PART, sending.offset):
        try:
          sending.write(part)
          stalled = 0
        except SandboxLost:
          stalled += 1
          if not resume or stalled > _RESUMES:
            raise
          sending.resume()
      if sending.offset != size:
        raise SandboxError(f"upload: {source} changed while it was read")
      return mode, size, sending.finish(sha256)
