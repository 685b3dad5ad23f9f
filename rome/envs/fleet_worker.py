"""The fleet's part on each host: a manager of its own, driven over Ray.

What crosses the wire is data: results, or the name and message of an error. Sessions, uploads and
downloads stay here, and the other side holds their numbers. Trees of files cross as a tar file, in
parts, through a temporary directory on this host.

A worker whose fleet is gone goes too, since Ray ends an actor with its driver; should Ray fail to,
the time limits of its own manager still hold.
"""

import dataclasses
import itertools
import os
import pathlib
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

from rome.envs import admission, common, queueing, records
from rome.envs.admission import Capacity
from rome.envs.common import SandboxError, SandboxSpec
from rome.envs.manager import Manager

CHUNK = 4 << 20  # bytes of a file in one message
_MARGIN = 60.0  # seconds by which a worker's time limits are longer than the fleet's
_STAY = ("Session", "Upload", "Download")  # classes of objects that stay here
METHODS = frozenset(
  "run session write_file read_file open_upload open_download lstat remove verify reset stats "
  "alive snapshot restore commit attempts close start send poll resize state write finish drop "
  "read".split()
)
ATTRIBUTES = frozenset(("offset", "size", "sha256", "network"))

ERRORS: dict[str, Callable[[str], Exception]] = {
  kind.__name__: kind
  for kind in (
    SandboxError,
    ValueError,
    FileExistsError,
    FileNotFoundError,
    common.SandboxLost,
    common.BackendUnavailable,
    common.ImageError,
    admission.CapacityExceeded,
    queueing.QueueFull,
    queueing.QueueTimeout,
    records.CreationFailed,
    records.ManagerClosed,
    records.UnknownSandbox,
  )
}

Answer = tuple[
  str, Any, str
]  # "value", it, "" | "object", its number, its class | "error", kind, text


def pack(source: pathlib.Path, archive: pathlib.Path) -> None:
  """Puts a file or a directory into a tar file under the name "it"."""
  with tarfile.open(archive, "w") as tar:

    def keep(member: tarfile.TarInfo) -> tarfile.TarInfo:
      cast(Any, tar).inodes.clear()  # hard links are files like others
      return member

    tar.add(source, "it", filter=keep)


def unpack(archive: pathlib.Path, into: pathlib.Path) -> pathlib.Path:
  """Unpacks what `pack` packed, with nothing that could leave `into`. Returns its path."""

  def check(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
    tarfile.data_filter(member, path)  # raises where it would leave
    if not (member.isreg() or member.isdir()):
      raise SandboxError(f"{member.name.removeprefix('it/')} is neither a file nor a directory")
    return member.replace(mode=member.mode & 0o777, deep=False)

  with tarfile.open(archive) as tar:
    tar.extractall(into, filter=check)
  return into / "it"


class Worker:
  """One host's sandboxes, by the names that the fleet gave them. A Ray actor with many threads."""

  def __init__(self, capacity: Capacity | None, warm: Mapping[SandboxSpec, int]):
    self._manager = Manager(capacity, warm=warm)
    self._ids: dict[str, str] = {}  # the fleet's names -> the manager's
    self._objects: dict[tuple[str, int], Any] = {}
    self._spools: dict[str, pathlib.Path] = {}
    self._numbers = itertools.count(1)
    self._lock = threading.Lock()

  def hello(self) -> tuple[Capacity, int]:
    """What this host has for sandboxes, and this process."""
    return self._manager.capacity, os.getpid()

  def create(self, name: str, spec: SandboxSpec, deadline: float) -> Answer:
    """Starts a sandbox. The value tells its id, backend, image and work directory."""
    longer = dataclasses.replace(spec, ttl=spec.ttl + _MARGIN, idle_ttl=spec.ttl + _MARGIN)

    def start() -> tuple[str, str, str, str]:
      record = self._manager.create(longer, deadline=deadline)
      with self._lock:
        self._ids[name] = record.id
      box = record.sandbox
      if box is None:
        raise records.CreationFailed(f"sandbox {name} ended at once: {record.error}")
      return box.id, box.backend, box.image, box.workdir

    return self._answer(name, start)

  def poll(self) -> dict[str, str]:
    """Names of sandboxes that ended by themselves, and why. They stay in it until `delete`."""
    with self._lock:
      ids = dict(self._ids)
    ended = {}
    for name, sandbox_id in ids.items():
      try:
        record = self._manager.get(sandbox_id)
      except records.UnknownSandbox:
        ended[name] = "it is forgotten"
        continue
      if record.life.finished:
        ended[name] = record.error or record.history[-1].reason
    return ended

  def delete(self, name: str) -> None:
    """Ends a sandbox and forgets its name. Idempotent."""
    with self._lock:
      sandbox_id = self._ids.pop(name, None)
      for key in [key for key in self._objects if key[0] == name]:
        del self._objects[key]
    if sandbox_id is not None:
      self._manager.delete(sandbox_id)

  def call(
    self, name: str, number: int, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
  ) -> Answer:
    """Calls a method of a sandbox (number 0) or of an object that stayed here, or reads a value."""

    def action() -> Any:
      if method not in METHODS | ATTRIBUTES:
        raise SandboxError(f"there is no {method!r} over the fleet")
      target = self._sandbox(name) if number == 0 else self._objects.get((name, number))
      if target is None:
        raise SandboxError(f"sandbox {name} has no object {number}: it is closed")
      if number and method in ("close", "drop"):
        with self._lock:
          self._objects.pop((name, number), None)
      value = getattr(target, method)
      return value(*args, **kwargs) if method in METHODS else value

    return self._answer(name, action)

  def fork(self, source: str, target: str) -> Answer:
    """Makes one sandbox of this host, just created, a fork of another."""

    def action() -> None:
      self._sandbox(source).fork(into=self._sandbox(target))

    return self._answer(source, action)

  def spool(self, name: str, remote: str | None, options: dict[str, Any]) -> Answer:
    """Opens a tar file here: empty, or with what lies at `remote`. The value is its token, size."""

    def action() -> tuple[str, int]:
      directory = pathlib.Path(tempfile.mkdtemp(prefix="rome-fleet-"))
      try:
        if remote is not None:
          self._sandbox(name).download(remote, directory / "it", **options)
          pack(directory / "it", directory / "tar")
        else:
          (directory / "tar").touch()
      except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
      with self._lock:
        self._spools[directory.name] = directory
      return directory.name, (directory / "tar").stat().st_size

    return self._answer(name, action)

  def read(self, token: str, offset: int) -> bytes:
    """A part of a tar file, empty at its end."""
    with open(self._spools[token] / "tar", "rb") as file:
      file.seek(offset)
      return file.read(CHUNK)

  def append(self, token: str, data: bytes) -> None:
    """Adds a part to a tar file."""
    with open(self._spools[token] / "tar", "ab") as file:
      file.write(data)

  def upload(self, name: str, token: str, remote: str, options: dict[str, Any]) -> Answer:
    """Uploads what a tar file holds."""

    def action() -> Any:
      directory = self._spools[token]
      return self._sandbox(name).upload(unpack(directory / "tar", directory), remote, **options)

    return self._answer(name, action)

  def drop(self, token: str) -> None:
    """Removes a tar file. Idempotent."""
    with self._lock:
      directory = self._spools.pop(token, None)
    if directory is not None:
      shutil.rmtree(directory, ignore_errors=True)

  def metrics(self) -> dict[str, float]:
    """Of the manager here."""
    return self._manager.metrics()

  def close(self) -> None:
    """Ends all sandboxes here."""
    for token in list(self._spools):
      self.drop(token)
    self._manager.close()

  def _sandbox(self, name: str) -> Any:
    with self._lock:
      sandbox_id = self._ids.get(name)
    record = self._manager.touch(sandbox_id) if sandbox_id else None
    if record is None or record.sandbox is None:
      reason = (record and record.error) or "it has ended"
      raise common.SandboxLost(f"sandbox {name} is lost: {reason}")
    return record.sandbox

  def _answer(self, name: str, action: Callable[[], Any]) -> Answer:
    """Runs an action; its result or error in a form that can cross."""
    try:
      value = action()
    except Exception as error:
      kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__name__ in ERRORS]
      kind, text = (
        (kinds[0], str(error)) if kinds else ("SandboxError", f"{type(error).__name__}: {error}")
      )
      return "error", kind, text
    if type(value).__name__ not in _STAY:
      return "value", value, ""
    with self._lock:
      number = next(self._numbers)
      self._objects[name, number] = value
    return "object", number, type(value).__name__
