"""Files of a remote sandbox: the same transfers as `transfer.py` and `trees.py`, over HTTP.

Files travel in parts of a few megabytes, each with its offset, so a broken connection costs one
part. What lands here is written below a fresh directory and gets its name when all is there; names
come from the agent, and one that could lead elsewhere is refused.

Left out: names that are not UTF-8 (skipped and told), and times (all files land as of now).
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
import stat
import tempfile
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rome.envs.common import SandboxError
from rome.envs.trees import MAX_DEPTH, Manifest, Transfer

if TYPE_CHECKING:
  from rome.envs.remote import RemoteSandbox

PART = 4 << 20  # bytes that travel in one request
_RESUMES = 5  # of one part
_CHECKSUM = "X-Checksum-SHA256"
_TIMEOUT = 120.0  # seconds for one part


class RemoteUpload:
  """A file on its way into a remote sandbox; see `transfer.Upload`.

  Attributes:
    path: where it will lie.
    offset: bytes that have arrived.
  """

  def __init__(self, sandbox: "RemoteSandbox", path: str, mode: int, owner: str):
    self.path, self.offset, self._sandbox = path, 0, sandbox
    self._params: dict[str, Any] = {"path": path, "mode": f"{mode:o}", "owner": owner}
    self._sha256, self._unconfirmed, self._over = hashlib.sha256(), b"", False
    self._put(b"", finish=False)

  def write(self, data: bytes) -> None:
    """Adds bytes. Where the connection breaks, `resume` and go on at `offset`."""
    for at in range(0, len(data), PART):
      self._unconfirmed = data[at : at + PART]
      self._put(self._unconfirmed, finish=False)
      self._confirm()

  def resume(self) -> None:
    """Asks the service how much has arrived; `offset` then says where to go on."""
    answer = self._sandbox.call("HEAD", "files", params={"path": self.path})
    arrived = int(answer.headers.get("X-Upload-Offset", -1))
    if arrived == self.offset + len(self._unconfirmed):
      self._confirm()
    elif arrived != self.offset:
      raise SandboxError(f"{self.path!r} holds {arrived} bytes, not {self.offset}: begin anew")

  def finish(self, sha256: str | None = None) -> str:
    """Puts the file in its place, whole. Returns its sha256; another one is refused."""
    digest = self._sha256.hexdigest()
    if sha256 is not None and sha256.lower() != digest:
      self.drop()
      raise SandboxError(f"{self.path!r} has sha256 {digest}, not {sha256}: it was dropped")
    self._put(b"", finish=True, headers={_CHECKSUM: digest})
    self._over = True
    return digest

  def drop(self) -> None:
    """Removes what has arrived. Idempotent; nothing happens after `finish`."""
    if not self._over:
      self._over = True
      with contextlib.suppress(SandboxError):  # the service drops it by itself in time
        if (
          "X-Upload-Offset"
          in self._sandbox.call("HEAD", "files", params={"path": self.path}).headers
        ):
          self._sandbox.call("DELETE", "files", params={"path": self.path})

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.drop()

  def _put(self, data: bytes, finish: bool, headers: dict[str, str] | None = None) -> None:
    params = {**self._params, "offset": self.offset, "finish": "true" if finish else "false"}
    self._sandbox.call(
      "PUT",
      "files",
      params=params,
      content=data,
      headers=headers,
      timeout=_TIMEOUT,
      idempotent=self.offset == 0,
    )

  def _confirm(self) -> None:
    self._sha256.update(self._unconfirmed)
    self.offset += len(self._unconfirmed)
    self._unconfirmed = b""


class RemoteDownload:
  """A file of a remote sandbox, read in parts; see `transfer.Download`. Each part is read by name,
  so a file that is replaced meanwhile shows in its size or its digest.

  Attributes:
    path: its name.
    size, mode: as they were when it was opened.
  """

  def __init__(self, sandbox: "RemoteSandbox", path: str):
    self.path, self._sandbox = path, sandbox
    headers = self._get(0, 0).headers
    self.size, self.mode = int(headers["X-File-Size"]), int(headers["X-File-Mode"], 8)

  def read(self, offset: int, n: int) -> bytes:
    """Returns up to `n` bytes from `offset`, fewer only at the end; at most 4 MiB."""
    answer = self._get(offset, min(n, PART))
    size, data = int(answer.headers["X-File-Size"]), bytes(answer.content)
    digest = answer.headers.get(_CHECKSUM)
    if size != self.size or (digest and hashlib.sha256(data).hexdigest() != digest):
      raise SandboxError(f"{self.path!r} changed while it was read: read it again")
    return data

  def close(self) -> None:
    """Nothing is held."""

  def _get(self, offset: int, length: int) -> Any:
    params = {"path": self.path, "offset": offset, "length": length, "checksum": "true"}
    return self._sandbox.call("GET", "files", params=params, timeout=_TIMEOUT)


def write_file(sandbox: "RemoteSandbox", path: str, data: bytes, mode: int, owner: str) -> None:
  """See `Sandbox.write_file`."""
  if owner not in ("agent", "root"):
    raise ValueError(f"owner must be 'agent' or 'root', not {owner!r}")
  sandbox.call(
    "PUT",
    "files",
    params={"path": path, "mode": f"{mode:o}", "owner": owner},
    content=data,
    headers={_CHECKSUM: hashlib.sha256(data).hexdigest()},
    timeout=_TIMEOUT + len(data) / (1 << 20),
  )


def read_file(sandbox: "RemoteSandbox", path: str, max_bytes: int) -> bytes:
  """See `Sandbox.read_file`."""
  download = RemoteDownload(sandbox, path)
  if download.size > max_bytes:
    raise SandboxError(f"{path!r} has {download.size} bytes, more than {max_bytes}")
  parts = [download.read(at, PART) for at in range(0, download.size, PART)]
  return b"".join(parts)


def upload(
  sandbox: "RemoteSandbox",
  local: str | os.PathLike[str],
  remote: str,
  owner: str,
  resume: bool,
  sha256: str | None,
) -> Transfer:
  """See `Sandbox.upload`."""
  source = pathlib.Path(local)
  if source.is_symlink() or not (source.is_file() or source.is_dir()):
    raise SandboxError(f"upload: {source} is neither a file nor a directory")
  if source.is_file():
    digest = _upload_file(sandbox, source, remote, owner, resume, sha256)
    return Transfer(1, source.stat().st_size, digest)
  if sha256 is not None:
    raise ValueError("sha256 is for a single file")
  manifest = Manifest()
  _make_dir(sandbox, remote, source, owner)
  for path in sorted(source.rglob("*")):
    name, info = path.relative_to(source).as_posix(), path.lstat()
    mode = stat.S_IMODE(info.st_mode) & 0o777
    if stat.S_ISDIR(info.st_mode):
      _make_dir(sandbox, f"{remote}/{name}", path, owner)
      manifest.add_dir(name, mode)
    elif stat.S_ISREG(info.st_mode):
      digest = _upload_file(sandbox, path, f"{remote}/{name}", owner, resume, None)
      manifest.add_file(name, mode, info.st_size, digest)
    else:
      raise SandboxError(f"upload: {path} is neither a file nor a directory")
  return manifest.transfer()


def _make_dir(sandbox: "RemoteSandbox", remote: str, source: pathlib.Path, owner: str) -> None:
  mode = stat.S_IMODE(source.stat().st_mode) & 0o777
  sandbox.call("PUT", "directory", params={"path": remote, "mode": f"{mode:o}", "owner": owner})


def _upload_file(
  sandbox: "RemoteSandbox",
  source: pathlib.Path,
  remote: str,
  owner: str,
  resume: bool,
  sha256: str | None,
) -> str:
  mode = stat.S_IMODE(source.stat().st_mode) & 0o777
  with RemoteUpload(sandbox, remote, mode, owner) as going, open(source, "rb") as file:
    resumes = 0
    while True:
      file.seek(going.offset)
      part = file.read(PART)
      if not part:
        return going.finish(sha256)
      try:
        going.write(part)
        resumes = 0
      except SandboxError as error:
        resumes += 1
        if not resume or getattr(error, "status", None) != 0 or resumes > _RESUMES:
          raise
        going.resume()


def download(
  sandbox: "RemoteSandbox",
  remote: str,
  local: str | os.PathLike[str],
  max_bytes: int,
  max_files: int,
  sha256: str | None,
) -> Transfer:
  """See `Sandbox.download`."""
  target = pathlib.Path(local)
  if os.path.lexists(target):
    raise FileExistsError(f"{target} exists: name a new one")
  with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as directory:
    landed = pathlib.Path(directory) / "landed"
    listing = _list(sandbox, remote, max_files)
    if listing is None:
      file = RemoteDownload(sandbox, remote)
      transfer = Transfer(1, file.size, _download_file(file, landed, max_bytes))
    else:
      transfer = _download_tree(sandbox, remote, listing, landed, max_bytes, max_files)
    if sha256 is not None and sha256.lower() != transfer.sha256:
      raise SandboxError(f"{remote!r} has sha256 {transfer.sha256}, not {sha256}")
    if os.path.lexists(target):
      raise FileExistsError(f"{target} exists: name a new one")
    shutil.move(landed, target)
  return transfer


def _list(sandbox: "RemoteSandbox", path: str, most: int) -> list[dict[str, str]] | None:
  """What a directory holds; None where there is no directory."""
  params: dict[str, Any] = {"path": path, "most": max(1, min(most, 100_000))}
  try:
    return list(sandbox.call("GET", "directory", params=params).json()["entries"])
  except SandboxError as error:
    code = getattr(error, "code", "")
    if code == "too_many_entries":
      raise SandboxError(f"{path!r} holds more than {most} files: raise max_files") from error
    if code != "no_such_file":
      raise
  return None


def _download_file(file: RemoteDownload, target: pathlib.Path, max_bytes: int) -> str:
  if file.size > max_bytes:
    raise SandboxError(f"{file.path!r} has {file.size} bytes, more than the {max_bytes} left")
  digest = hashlib.sha256()
  with open(target, "xb") as out:
    for at in range(0, file.size, PART):
      part = file.read(at, PART)
      digest.update(part)
      out.write(part)
  target.chmod(file.mode & 0o777)
  return digest.hexdigest()


def _download_tree(
  sandbox: "RemoteSandbox",
  top: str,
  listing: list[dict[str, str]],
  landed: pathlib.Path,
  max_bytes: int,
  max_files: int,
) -> Transfer:
  manifest, count = Manifest(), len(listing)
  landed.mkdir()
  modes: list[tuple[pathlib.Path, int]] = []  # given last: a directory may forbid writing in it
  pending = [("", entry) for entry in listing]
  while pending:
    above, entry = pending.pop()
    name, mode = f"{above}{entry['name']}", int(entry["mode"], 8)
    if not _is_plain(entry["name"]):
      manifest.skip(name, "its name is not UTF-8, or could lead elsewhere")
    elif entry["kind"] == "file":
      file = RemoteDownload(sandbox, f"{top}/{name}")
      digest = _download_file(file, landed / name, max_bytes - manifest.bytes)
      manifest.add_file(name, file.mode & 0o777, file.size, digest)
    elif entry["kind"] == "directory":
      if name.count("/") >= MAX_DEPTH:
        raise SandboxError(f"{name[:200]!r}… lies deeper than {MAX_DEPTH} directories: refused")
      (landed / name).mkdir()
      modes.append((landed / name, mode & 0o777))
      manifest.add_dir(name, mode & 0o777)
      below = _list(sandbox, f"{top}/{name}", max_files - count) or []
      count += len(below)
      pending += [(f"{name}/", child) for child in below]
    else:
      manifest.skip(name, "it is no file and no directory")
    if count > max_files:
      raise SandboxError(f"{top!r} holds more than {max_files} files: raise max_files")
  for path, mode in reversed(modes):
    path.chmod(mode)
  return manifest.transfer()


def _is_plain(name: str) -> bool:
  """Whether a name from the agent is one name here: not a path, not hidden in bytes."""
  if name in ("", ".", "..") or "/" in name or "\0" in name:
    return False
  return not any("\ud800" <= character <= "\udfff" for character in name)
