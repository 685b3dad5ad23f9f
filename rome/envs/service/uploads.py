"""Uploads that are under way: what has arrived waits for the client to come back.

An upload belongs to a place in a sandbox. Where the client's connection breaks, what has arrived
stays, and a later request goes on at that offset. One that nobody continues is dropped.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

from rome.envs.sandbox import Sandbox
from rome.envs.service.errors import ApiError
from rome.envs.transfer import Upload

IDLE = 600.0  # seconds that an unfinished upload waits for its continuation
MOST = 4  # unfinished uploads of one sandbox


@dataclasses.dataclass
class Entry:
  """An upload, and whether a request feeds it."""

  upload: Upload
  fed: bool = True
  used: float = dataclasses.field(default_factory=time.monotonic)


class Uploads:
  """Of every sandbox, by path. Its methods are for the event loop."""

  def __init__(self) -> None:
    self._entries: dict[tuple[str, str], Entry] = {}

  def offset(self, sandbox_id: str, path: str) -> int | None:
    """Bytes that an unfinished upload has; None where there is none."""
    entry = self._entries.get((sandbox_id, path))
    return None if entry is None else entry.upload.offset

  def make_room(self, sandbox_id: str, path: str) -> Upload | None:
    """Before a new upload. Returns the old one of this place, which is to be dropped.

    Raises:
      ApiError: 409, another request feeds it, or there are too many.
    """
    key = (sandbox_id, path)
    if key in self._entries:
      self._check_free(self._entries[key])
      return self._entries.pop(key).upload
    if sum(name == sandbox_id for name, _ in self._entries) >= MOST:
      raise ApiError(
        409, "too_many_uploads", f"{MOST} uploads are unfinished", "finish or delete one of them"
      )
    return None

  @contextlib.contextmanager
  def feeding(self, sandbox_id: str, path: str, upload: Upload) -> Iterator[Upload]:
    """While a request feeds a new upload. It stays known until `forget`."""
    entry = self._entries[sandbox_id, path] = Entry(upload)
    yield from self._feed(entry)

  @contextlib.contextmanager
  def resuming(self, sandbox_id: str, path: str, offset: int) -> Iterator[Upload]:
    """While a request feeds an upload on, from `offset`.

    Raises:
      ApiError: 409, there is none, it stands elsewhere, or another request feeds it.
    """
    entry = self._entries.get((sandbox_id, path))
    if entry is None:
      raise ApiError(409, "no_upload", "there is no unfinished upload", "begin it at offset 0")
    self._check_free(entry)
    if entry.upload.offset != offset:
      raise ApiError(
        409,
        "wrong_offset",
        f"the upload has {entry.upload.offset} bytes, not {offset}",
        "go on where it stands: HEAD tells",
      )
    entry.fed = True
    yield from self._feed(entry)

  def forget(self, sandbox_id: str, path: str) -> Upload | None:
    """Forgets an upload and returns it."""
    entry = self._entries.pop((sandbox_id, path), None)
    return None if entry is None else entry.upload

  def stale(self, running: set[str]) -> list[Upload]:
    """Forgets and returns those that nobody continued, or whose sandbox has ended."""
    now, found = time.monotonic(), []
    for (sandbox_id, path), entry in list(self._entries.items()):
      if sandbox_id not in running or (not entry.fed and now - entry.used > IDLE):
        found.append(self._entries.pop((sandbox_id, path)).upload)
    return found

  @property
  def sandboxes(self) -> set[str]:
    """Ids of those with unfinished uploads."""
    return {name for name, _ in self._entries}

  def _feed(self, entry: Entry) -> Iterator[Upload]:
    try:
      yield entry.upload
    finally:
      entry.fed, entry.used = False, time.monotonic()

  def _check_free(self, entry: Entry) -> None:
    if entry.fed:
      raise ApiError(
        409, "upload_busy", "another request feeds this upload", "wait until it has ended"
      )


def begin(sandbox: Sandbox, old: Upload | None, path: str, mode: int, owner: str) -> Upload:
  """Opens an upload in place of an old one. Blocks."""
  if old is not None:
    old.drop()
  return sandbox.open_upload(path, mode, owner)
