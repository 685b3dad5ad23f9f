"""Snapshots of a sandbox's files and sessions, and what is made of them: forks and images.

A snapshot is a canonical stream of all that differs from the image (rocklet/snapshot.c writes it,
and says what is kept), with the state of the default session. The host only stores and hashes the
stream; what a hostile agent may have put in it is read again inside sandboxes only. Every restore
is verified by taking the new sandbox's snapshot and comparing digests.

Not kept, by design: processes (their names are), what lies in /dev/shm, sockets, open files without
a name. Left out: restoring into an image other than the one the snapshot was taken of; states of
sessions other than the default one, which `Session.state` and `Session.restore` carry over.
"""

import dataclasses
import hashlib
import json
import mmap
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

from rome.envs.common import SandboxError, SandboxLost
from rome.envs.rocklet import client

if TYPE_CHECKING:
  from rome.envs.sandbox import Sandbox

_FORMAT = "rome-snapshot-1"
_MAX_HEADER = 1 << 20  # bytes


class SnapshotError(SandboxError):
  """A snapshot's file is damaged, or what was restored is not what was taken."""


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
  """A sandbox's change to its image at one moment. Cheap to keep: it lies in an unlinked file.

  Attributes:
    digest: SHA-256 of the files' part, in hex. Two sandboxes of one image have the same digest if
      and only if their files are the same: names, contents, owners, modes, times.
    image: the image that it is the change to.
    data: the stream of rocklet/snapshot.h.
    state: bash text that restores the default session; never run it anywhere but in a sandbox.
    lost: names of the processes that ran, beside the sessions' shells; a fork does not have them.
    lost_sockets: how many sockets lay in the file system; a fork does not have them.
  """

  digest: str
  image: str
  data: memoryview = dataclasses.field(repr=False)
  state: bytes = dataclasses.field(repr=False)
  lost: tuple[str, ...] = ()
  lost_sockets: int = 0

  @property
  def size(self) -> int:
    """Bytes of the files' part."""
    return len(self.data)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes it to a file, whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    target = pathlib.Path(path)
    header = {
      "format": _FORMAT,
      "digest": self.digest,
      "size": self.size,
      "image": self.image,
      "lost": self.lost,
      "lost_sockets": self.lost_sockets,
      "state_digest": hashlib.sha256(self.state).hexdigest(),
    }
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
      with open(handle, "wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        file.write(self.data)
        file.write(self.state)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, target)
    except BaseException:
      os.unlink(temporary)
      raise

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> "Snapshot":
    """Reads what `save` wrote, and checks it against its digests.

    They protect against damage; somebody who can write the file can also write the digests. What is
    then in it is still only ever read inside a sandbox, which refuses what it does not understand.

    Raises:
      SnapshotError: it is no snapshot or is damaged.
      OSError: it cannot be read.
    """
    damaged = SnapshotError(f"{os.fspath(path)} is no snapshot, or damaged: save it anew")
    with open(path, "rb") as file:
      line = file.readline(_MAX_HEADER)
      try:
        header = json.loads(line)
        if header["format"] != _FORMAT:
          raise damaged
        spool, left = Spool(), int(header["size"])
        while left and (part := file.read(min(left, 1 << 20))):
          spool.add(part)
          left -= len(part)
        snapshot = cls(
          digest=str(header["digest"]),
          image=str(header["image"]),
          data=spool.finish(),
          state=file.read(client.MAX_TEXT),
          lost=tuple(str(name) for name in header["lost"]),
          lost_sockets=int(header["lost_sockets"]),
        )
        state_digest = hashlib.sha256(snapshot.state).hexdigest()
        if snapshot.digest != spool.hash.hexdigest() or state_digest != header["state_digest"]:
          raise damaged
      except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged from error
    return snapshot


class Spool:
  """Bytes on their way into an unlinked file, and their hash."""

  def __init__(self) -> None:
    self.hash = hashlib.sha256()
    self._file = tempfile.TemporaryFile()

  def add(self, part: bytes) -> None:
    self.hash.update(part)
    self._file.write(part)

  def finish(self) -> memoryview:
    with self._file as file:
      file.flush()
      return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def take(sandbox: "Sandbox", timeout: float) -> Snapshot:
  """See `Sandbox.snapshot`."""
  state = sandbox._session.state(timeout)
  spool = Spool()
  lost = stream(sandbox, spool.add, timeout)
  sockets, *names = lost.decode("utf-8", "replace").split("\0")[:-1]
  return Snapshot(
    digest=spool.hash.hexdigest(),
    image=sandbox.image,
    data=spool.finish(),
    state=state,
    lost=tuple(names),
    lost_sockets=int(sockets),
  )


def stream(sandbox: "Sandbox", sink: Callable[[bytes], object], timeout: float) -> bytes:
  try:
    connection = sandbox._connection()
    return connection.stream(client.SNAPSHOT, sink, timeout=timeout).data
  except client.RequestError as error:
    raise SandboxError(f"sandbox {sandbox.id}: {error}") from error
  except SandboxLost as error:
    raise sandbox._is_lost() from error


def transplant(source: "Sandbox", target: "Sandbox", timeout: float = 60.0) -> None:
  """Gives `target` the files of `source`, and nothing else: what a verifier needs of a fork.

  Unlike `Sandbox.restore` it neither compares digests nor restores the session.

  Raises:
    SandboxError: see `Sandbox.snapshot` and `Sandbox.restore`.
  """
  spool = Spool()
  stream(source, spool.add, timeout)
  _put(target, spool.finish(), source.image, timeout)


def restore(sandbox: "Sandbox", snapshot: Snapshot, timeout: float) -> None:
  """See `Sandbox.restore`."""
  _put(sandbox, snapshot.data, snapshot.image, timeout)
  check = hashlib.sha256()
  stream(sandbox, check.update, timeout)
  if check.hexdigest() != snapshot.digest:
    raise SnapshotError(f"sandbox {sandbox.id} does not hold what was restored: close it")
  sandbox._session.restore(snapshot.state)


def _put(sandbox: "Sandbox", data: memoryview, image: str, timeout: float) -> None:
  if image != sandbox.image:
    raise ValueError(
      f"the snapshot is of image {image!r}, and sandbox {sandbox.id} runs {sandbox.image!r}"
    )
  try:
    sandbox._connection().send(client.RESTORE, data, timeout=timeout)
  except client.RequestError as error:
    raise SandboxError(f"sandbox {sandbox.id} is empty again: {error}") from error
  except SandboxLost as error:
    raise sandbox._is_lost() from error
