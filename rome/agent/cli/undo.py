"""Files of the work directory as they were before an instruction, for /undo; without git.

Before each instruction the files that changed since the last one are copied, by content, into a
directory beside the conversation. They are read here, through no symbolic link, and written back
through the sandbox, which follows none either.

It cannot bring back: what lies in `.git` (commits, branches), what is larger than `MAX_FILE`, or
beyond `MAX_FILES` and `MAX_BYTES` together, what lies `MAX_DEPTH` deep, empty directories,
owners, and anything outside the directory (databases, the network). What was left out is told.
"""

import dataclasses
import hashlib
import os
import pathlib
import shutil
import stat

from rome.envs.sandbox import Sandbox

MAX_FILE = 4 << 20
MAX_FILES = 20_000
MAX_BYTES = 256 << 20
MAX_DEPTH = 100
KEPT = 20  # instructions that can be taken back
_SKIPPED = (".git",)
_PARTIAL = ""  # no path: stands in a manifest of which something is missing


@dataclasses.dataclass(frozen=True)
class Seen:
  """A file as it was. `digest` is the target of a symbolic link, "" of what was left out."""

  mode: int
  size: int
  ctime_ns: int  # which, other than mtime, nobody can set back
  inode: int
  digest: str


Manifest = dict[str, Seen]


class Undo:
  """The last states of one directory.

  Args:
    root: the directory, on this host.
    store: a directory for copies, made here and removed by `close`.
  """

  def __init__(self, root: str, store: pathlib.Path):
    self._root, self._store = root, store
    self._states: list[Manifest] = []

  def keep(self) -> None:
    """Keeps the state as it is, before an instruction is carried out."""
    self._store.mkdir(parents=True, exist_ok=True, mode=0o700)
    before = self._states[-1] if self._states else {}
    self._states.append(self._look(before, copy=True))
    if len(self._states) > KEPT:
      del self._states[0]
      self._prune()

  def undo(self, sandbox: Sandbox) -> list[str]:
    """Brings back the state before the last instruction. Returns what it did, a line each.

    Raises:
      SandboxError: a file cannot be brought back; the others before it are.
      LookupError: nothing is left to be undone.
    """
    if not self._states:
      raise LookupError("nothing to undo")
    then = self._states.pop()
    now = self._look(then, copy=False)
    told = []
    if _PARTIAL in then:
      told.append(f"not all of {self._root} was kept; files that are new stay")
    for path in sorted((set(then) | set(now)) - {_PARTIAL}, key=lambda p: (p in then, p)):
      old, new = then.get(path), now.get(path)
      if old is not None and not old.digest:
        if new is None or (new.ctime_ns, new.size) != (old.ctime_ns, old.size):
          told.append(f"left as it is, too large: {path}")
      elif old is None:
        if _PARTIAL not in then:  # else it may have been there
          sandbox.remove(path)
          told.append(f"removed {path}")
      elif stat.S_ISLNK(old.mode) and new != old:
        told.append(f"left as it is, was a link to {old.digest}: {path}")
      elif new is None or (new.digest, new.mode) != (old.digest, old.mode):
        self._restore(sandbox, path, old, new)
        told.append(f"restored {path}")
    return told

  def close(self) -> None:
    """Removes the copies."""
    shutil.rmtree(self._store, ignore_errors=True)

  def _restore(self, sandbox: Sandbox, path: str, old: Seen, new: Seen | None) -> None:
    if new is not None and stat.S_IFMT(new.mode) != stat.S_IFMT(old.mode):
      sandbox.remove(path)
    data = (self._store / old.digest).read_bytes()
    sandbox.write_file(path, data, mode=stat.S_IMODE(old.mode))

  def _look(self, before: Manifest, copy: bool) -> Manifest:
    """What is there. Files that look as in `before` are not read."""
    found: Manifest = {}
    total = 0

    def unread(error: OSError) -> None:
      found[_PARTIAL] = Seen(0, 0, 0, 0, _PARTIAL)

    for base, dirs, names, fd in os.fwalk(self._root, onerror=unread, follow_symlinks=False):
      top = os.path.relpath(base, self._root)
      dirs[:] = sorted(d for d in dirs if top != "." or d not in _SKIPPED)
      if dirs and top.count("/") >= MAX_DEPTH:  # fwalk calls itself, with a descriptor for each
        unread(OSError())
        dirs[:] = []
      for name in sorted([*names, *(d for d in dirs if _is_link(d, fd))]):
        path = os.path.normpath(os.path.join(top, name))
        try:
          status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError:
          continue  # gone meanwhile
        if len(found) >= MAX_FILES:
          found[_PARTIAL] = Seen(0, 0, 0, 0, _PARTIAL)
          return found
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
          continue
        digest = ""
        if stat.S_ISLNK(status.st_mode):
          try:
            digest = os.readlink(name, dir_fd=fd)
          except OSError:
            continue
        elif status.st_size <= MAX_FILE and total + status.st_size <= MAX_BYTES:
          total += status.st_size
          digest = self._digest(name, fd, status, before.get(path), copy)
        found[path] = Seen(
          status.st_mode, status.st_size, status.st_ctime_ns, status.st_ino, digest
        )
    return found

  def _digest(
    self, name: str, fd: int, status: os.stat_result, before: Seen | None, copy: bool
  ) -> str:
    now = (status.st_size, status.st_ctime_ns, status.st_ino)
    if (
      before is not None
      and before.digest
      and now
      == (
        before.size,
        before.ctime_ns,
        before.inode,
      )
    ):
      return before.digest
    try:
      file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)
    except OSError:
      return ""
    with open(file, "rb") as opened:
      data = opened.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
      return ""
    digest = hashlib.sha256(data).hexdigest()
    if copy and not (self._store / digest).exists():
      (self._store / digest).write_bytes(data)
    return digest

  def _prune(self) -> None:
    """Removes copies that no state has."""
    used = {seen.digest for state in self._states for seen in state.values()}
    for path in self._store.iterdir():
      if path.name not in used:
        path.unlink()


def _is_link(name: str, fd: int) -> bool:
  try:
    return stat.S_ISLNK(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)
  except OSError:
    return False
