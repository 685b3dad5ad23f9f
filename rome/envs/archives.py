"""Tar archives into and out of a sandbox, read and written by Python's tarfile as streams.

An archive is hostile input that this process parses, so every member is checked before anything of
it is written: only plain files and directories, below the top, each once, within the limits. A
refusal names the member. Members before it have been written and stay; a member is never half
there, as each goes through an upload.

Choice: headers that say the same thing twice, once harmlessly, are refused (a pax path or size
where the plain header could have held it), as is whatever other readers may see differently.

Left out: zip, whose directory stands at the end, so that it is no stream; bzip2; zstd, which the
standard library reads only from Python 3.14 on; links, which a snapshot keeps.
"""

import hashlib
import io
import lzma
import math
import os
import tarfile
import zlib
from typing import IO, TYPE_CHECKING, Self

from rome.envs.channel import PART, Channel, FileStat, channel
from rome.envs.common import SandboxError
from rome.envs.rocklet import client
from rome.envs.transfer import Download, open_upload
from rome.envs.trees import CHANGED, MAX_DEPTH, Manifest, Transfer, walk

if TYPE_CHECKING:
  from rome.envs.sandbox import Sandbox

_MAX_HEADER = 64 << 10  # bytes of one extended header
_FREE = 16 << 20  # bytes that may come out of an archive before the compression ratio counts
_XZ_MEMORY = 128 << 20  # bytes; the presets up to -9 need 65 MiB
_EXTENDED = (
  tarfile.XHDTYPE,
  tarfile.XGLTYPE,
  tarfile.SOLARIS_XHDTYPE,
  tarfile.GNUTYPE_LONGNAME,
  tarfile.GNUTYPE_LONGLINK,
)
_KINDS = {
  tarfile.SYMTYPE: "a symbolic link",
  tarfile.LNKTYPE: "a hard link",
  tarfile.CHRTYPE: "a device",
  tarfile.BLKTYPE: "a device",
  tarfile.FIFOTYPE: "a fifo",
  tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class ArchiveError(SandboxError):
  """An archive is damaged or holds something that is refused; the message names the member."""


def _refuse(name: str, why: str) -> ArchiveError:
  return ArchiveError(f"archive member {name[:200]!r} {why}: refused")


class _Header(tarfile.TarInfo):
  """A member's header that remembers what its plain block said, and refuses early what tarfile
  would follow into memory or take for the end of the archive."""

  plain_name: str
  plain_size: int

  @classmethod
  def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
    if not buf:
      raise ArchiveError("the archive ends without its end mark: it is cut short")
    try:
      header = super().frombuf(buf, encoding, errors)
    except tarfile.HeaderError as error:
      if any(buf) or len(buf) != tarfile.BLOCKSIZE:
        raise ArchiveError(f"the archive holds a damaged header: {error}") from error
      raise
    if header.size < 0:
      raise _refuse(header.name, "has a negative size")
    if header.type in _EXTENDED and header.size > _MAX_HEADER:
      raise _refuse(header.name, f"has an extended header of {header.size} bytes")
    if header.type == tarfile.GNUTYPE_SPARSE:
      raise _refuse(header.name, "is a sparse file")
    header.plain_name, header.plain_size = header.name, header.size
    return header

  # The maps of sparse files may be as long as the archive. `_check` refuses them, too.
  def _sparse(self, *args: object) -> None:
    raise _refuse(self.name, "is a sparse file")

  _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _sparse


class _Plain:
  """The bytes of an archive, decompressed if need be: never more at a time than asked for."""

  def __init__(self, source: IO[bytes], max_bytes: int, max_ratio: float):
    self._source = source
    self._max_bytes = max_bytes
    self._max_ratio = max_ratio
    self._raw = source.read(6)
    self._taken, self._given = len(self._raw), 0
    self._kind = "tar"
    self._decoder: zlib._Decompress | lzma.LZMADecompressor | None = None
    if self._raw.startswith(b"\x1f\x8b"):
      self._kind = "gz"
    elif self._raw.startswith(b"\xfd7zXZ\0"):
      self._kind = "xz"
    elif self._raw.startswith((b"BZh", b"\x28\xb5\x2f\xfd", b"PK\3\4")):
      raise ArchiveError("the archive is bzip2, zstd or zip: give a plain tar, gz or xz")

  def read(self, n: int) -> bytes:
    """Reads `n` bytes, fewer only at the end."""
    parts = []
    while n > 0 and (part := self._more(n)):
      parts.append(part)
      n -= len(part)
      self._given += len(part)
      if self._given > self._max_bytes:
        raise ArchiveError(f"the archive holds more than {self._max_bytes} bytes: raise max_bytes")
      if self._given > _FREE and self._given > self._max_ratio * self._taken:
        raise ArchiveError(f"the archive is compressed more than {self._max_ratio} times: refused")
    return b"".join(parts)

  def _input(self) -> bytes:
    data, self._raw = self._raw, b""
    if not data:
      data = self._source.read(65536)
      self._taken += len(data)
    return data

  def _more(self, n: int) -> bytes:
    if self._kind == "tar":
      data = self._input()
      self._raw = data[n:]
      return data[:n]
    try:
      return self._decode(n)
    except (zlib.error, lzma.LZMAError) as error:
      raise ArchiveError(f"the archive is damaged: {error}") from error

  def _decode(self, n: int) -> bytes:
    out = b""
    while not out:
      hungry = not isinstance(self._decoder, lzma.LZMADecompressor) or self._decoder.needs_input
      data = self._input() if hungry else b""
      if self._decoder is None:
        data = data.lstrip(b"\0")  # padding between and after streams
        if not data and not (data := self._input().lstrip(b"\0")):
          return b""
        self._decoder = (
          zlib.decompressobj(31)
          if self._kind == "gz"
          else lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        )
      elif hungry and not data:
        raise ArchiveError("the archive is cut short")
      out = self._decoder.decompress(data, n)
      if self._decoder.eof:
        self._raw = self._decoder.unused_data
        self._decoder = None
      elif not isinstance(self._decoder, lzma.LZMADecompressor):
        self._raw = self._decoder.unconsumed_tail
    return out


def _clean_name(name: str) -> str:
  """The path below the top, '' for the top itself. Raises ArchiveError."""
  parts = [part for part in name.split("/") if part not in ("", ".")]
  if name.startswith("/") or ".." in parts or "\0" in name:
    raise _refuse(name, "leads out of the archive's top")
  if any(len(os.fsencode(part)) > 255 for part in parts) or len(os.fsencode(name)) > 3000:
    raise _refuse(name, "has too long a name")
  if len(parts) > MAX_DEPTH:
    raise _refuse(name, f"lies deeper than {MAX_DEPTH} directories")
  return "/".join(parts)


def _check(member: _Header, archive: tarfile.TarFile, max_bytes: int) -> None:
  """Refuses whatever is no plain file or directory, or is told in two ways."""
  name = member.name
  if not (member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.isdir()):
    raise _refuse(name, f"is {_KINDS.get(member.type, f'of the unknown type {member.type!r}')}")
  if member.issparse() or any(key.startswith("GNU.sparse") for key in member.pax_headers):
    raise _refuse(name, "is a sparse file")
  shared = {"path", "linkpath", "size"}.intersection(archive.pax_headers)
  if shared:
    raise _refuse(name, f"has its {shared.pop()} from a header for all members")
  fits = name.isascii() and len(name) < 99
  if fits and name.rstrip("/") != member.plain_name.rstrip("/"):
    raise _refuse(name, f"is called {member.plain_name!r} by its plain header")
  if member.size != member.plain_size and member.size < 8 << 30:
    raise _refuse(name, f"has two sizes, {member.plain_size} and {member.size}")
  if member.size < 0 or (member.isdir() and member.size):
    raise _refuse(name, f"has an impossible size of {member.size}")
  if member.size > max_bytes:
    raise _refuse(name, f"takes the archive above its limit by {member.size - max_bytes} bytes")


def _mtime_ns(member: tarfile.TarInfo) -> int:
  seconds = float(member.mtime)
  if not math.isfinite(seconds) or abs(seconds) >= 2**33:
    raise _refuse(member.name, f"has the impossible time {seconds}")
  return int(seconds * 1000) * 10**6


def upload_archive(
  sandbox: "Sandbox",
  fileobj: IO[bytes],
  remote: str,
  *,
  owner: str = "agent",
  max_files: int = 100_000,
  max_bytes: int = 1 << 30,
  max_ratio: float = 200.0,
) -> Transfer:
  """Unpacks a tar archive (plain, gz or xz) into a directory of the sandbox.

  Modes (without setuid, setgid and sticky bits) and times are kept, owners are not.

  Args:
    sandbox: where to.
    fileobj: the archive, a binary stream; it need not seek.
    remote: the directory, made if it misses.
    owner: "agent" or "root".
    max_files: members.
    max_bytes: in all members together.
    max_ratio: how many times as long as the archive its content may be, above 16 MiB.

  Raises:
    ArchiveError: it is damaged, or a member is refused; see the module.
    SandboxError: something cannot be written.
    SandboxLost: the sandbox died.
  """
  plain = _Plain(fileobj, max_bytes + (max_files + 256) * 4096, max_ratio)
  manifest, seen, count = Manifest(), dict[str, str](), 0
  try:
    with (
      channel(sandbox) as lent,
      tarfile.open(fileobj=plain, mode="r|", tarinfo=_Header) as archive,  # type: ignore[call-overload]
    ):
      lent.make_dir(remote, 0o755, owner)
      while (member := archive.next()) is not None:
        archive.members.clear()  # a stream never goes back to them
        count += 1
        if count > max_files:
          raise _refuse(member.name, f"is one more than the limit of {max_files} members")
        path, mode = _clean_name(member.name), member.mode & 0o777
        _check(member, archive, max_bytes - manifest.bytes)
        _enter(seen, path, member)
        if len(seen) > max_files:
          raise _refuse(member.name, f"takes the archive above {max_files} names")
        if member.isdir():
          if path:
            lent.make_dir(f"{remote}/{path}", mode, owner)
            manifest.add_dir(path, mode)
          continue
        content = archive.extractfile(member)
        assert content is not None
        digest = _send(lent, content, member, f"{remote}/{path}", mode, owner)
        manifest.add_file(path, mode, member.size, digest)
      _check_rest(archive)
  except (tarfile.TarError, RecursionError, ValueError, OverflowError) as error:
    raise ArchiveError(f"the archive is damaged: {error}") from error
  return manifest.transfer()


def _check_rest(archive: tarfile.TarFile) -> None:
  """Reads on to the end, where checksums stand and where other readers may find more members."""
  assert archive.fileobj is not None
  while part := archive.fileobj.read(65536):
    if any(part):
      raise ArchiveError("the archive goes on after its end mark: refused")


def _enter(seen: dict[str, str], path: str, member: tarfile.TarInfo) -> None:
  """Notes a member's path and those above it. Raises ArchiveError if they were something else."""
  if not path and not member.isdir():
    raise _refuse(member.name, "is the archive's top, but no directory")
  if path in seen and not (member.isdir() and seen[path] == "implied"):
    raise _refuse(member.name, "appears twice")
  above = path.rpartition("/")[0]
  while above and seen.setdefault(above, "implied") != "file":
    above = above.rpartition("/")[0]
  if above:
    raise _refuse(member.name, f"lies below {above!r}, which is a file")
  seen[path] = "member" if member.isdir() else "file"


def _send(
  lent: Channel, content: IO[bytes], member: tarfile.TarInfo, path: str, mode: int, owner: str
) -> str:
  """Writes one file. Returns its sha256."""
  mtime = _mtime_ns(member)
  if member.size <= PART:
    data = content.read(member.size)
    if len(data) != member.size:
      raise _refuse(member.name, "is cut short")
    lent.put(path, data, mode, owner, mtime)
    return hashlib.sha256(data).hexdigest()
  with open_upload(lent.sandbox, path, mode, owner, mtime) as upload:
    while part := content.read(PART):
      upload.write(part)
    if upload.offset != member.size:
      raise _refuse(member.name, "is cut short")
    return upload.finish()


class _Hashed(io.RawIOBase):
  """A download as a file that tarfile reads, hashed on the way."""

  def __init__(self, source: Download):
    self._source = source
    self._at = 0
    self.digest = hashlib.sha256()

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
    part = self._source.read(self._at, len(buffer))
    buffer[: len(part)] = part
    self._at += len(part)
    self.digest.update(part)
    return len(part)


def _info(name: str, kind: bytes, found: FileStat) -> tarfile.TarInfo:
  info = tarfile.TarInfo(name)
  info.type, info.mode, info.mtime = kind, found.mode & 0o777, found.mtime_ns // 10**9
  info.uid, info.gid = found.uid, found.gid
  return info


def _add_file(archive: tarfile.TarFile, name: str, source: Download) -> str:
  """Adds an open file to an archive. Returns its sha256."""
  info = _info(name, tarfile.REGTYPE, source.stat)
  info.size = source.size
  content = _Hashed(source)
  archive.addfile(info, io.BufferedReader(content, PART))  # tarfile asks for less at a time
  return content.digest.hexdigest()


def download_archive(
  sandbox: "Sandbox",
  remote: str,
  fileobj: IO[bytes],
  *,
  max_files: int = 100_000,
  max_bytes: int = 1 << 30,
) -> Transfer:
  """Writes a file or a directory of the sandbox as a plain tar archive.

  The same tree gives the same bytes: sorted, owners by number only, times whole seconds. What is no
  file and no directory is left out and told in the result.

  Args:
    sandbox: where from.
    remote: the path; members are named relative to it, a single file by its last name.
    fileobj: a binary stream to write to.
    max_files: names of all kinds in a directory.
    max_bytes: in all files together.

  Raises:
    SandboxError: it cannot be read, changed meanwhile, or exceeds a limit. The archive is then cut
      short and lacks its end mark.
    SandboxLost: the sandbox died.
  """
  manifest = Manifest()
  archive = tarfile.open(fileobj=fileobj, mode="w|", format=tarfile.PAX_FORMAT)
  with channel(sandbox) as lent:
    if lent.lstat(remote).kind != "directory":
      name = remote.rstrip("/").rpartition("/")[2]
      with Download(lent, remote, max_bytes) as source:
        digest = _add_file(archive, name, source)
      archive.close()
      return Transfer(1, source.size, digest)
    for entry in walk(lent, remote, max_files, manifest):
      full = f"{remote}/{entry.path}"
      try:
        if entry.kind == "d":
          archive.addfile(_info(entry.path, tarfile.DIRTYPE, lent.lstat(full)))
          manifest.add_dir(entry.path, entry.mode)
          continue
        source = Download(lent, full, max_bytes - manifest.bytes)
      except client.RequestError as error:
        if error.errno not in CHANGED:
          raise
        manifest.skip(entry.path, "it changed while the tree was read")
        continue
      with source:
        digest = _add_file(archive, entry.path, source)
      manifest.add_file(entry.path, source.stat.mode & 0o777, source.size, digest)
  archive.close()
  return manifest.transfer()
