"""What git on this host would obey, and the agent has put into the directory.

Git runs programs that a repository's configuration and hooks name, even for `git status`. Those of
the directory's own repository are read-only to the agent (`rome.envs.backends.host`), yet it may
make repositories, as programs do too; git obeys one that is entered or stands as a submodule in the
index, and `.git/commondir` moves the configuration elsewhere. So what is new or was changed is told
before the person uses git here.

Left out: all else that the person may run (Makefiles, scripts, `.envrc`): it shows in diffs.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator

from rome.agent.cli.safe import line

MAX_DIRECTORIES = 50_000
MAX_DEPTH = 100
_OBEYED = ("config", "config.worktree", "commondir")
_MAX_READ = 1 << 20
_TOLD = 10  # paths
_MANY = "(more directories than are looked at)"


class Planted:
  """Looks at one directory of this host.

  Args:
    root: the directory as it is before the agent works in it.
  """

  def __init__(self, root: str):
    self._root = root
    self._known = dict(_obeyed(root))

  def news(self) -> list[str]:
    """Paths in the directory that are new or were changed since the last look."""
    now = dict(_obeyed(self._root))
    found = sorted(path for path, what in now.items() if self._known.get(path) != what)
    self._known = now
    return found

  def tell(self, note: Callable[[str], None]) -> None:
    """Says what is new, if there is something."""
    if found := self.news():
      more = f" and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
      note(
        f"git on your side would obey what is new in {', '.join(map(line, found[:_TOLD]))}{more}: "
        "look at it before you use git in this directory"
      )


def _obeyed(root: str) -> Iterator[tuple[str, str]]:
  """Files that git obeys, relative to the root, and what they say."""
  seen = 0
  waiting = [(".", 0)]
  while waiting:
    top, depth = waiting.pop()
    try:
      with os.scandir(os.path.join(root, top)) as entries:
        names = {one.name: one.is_dir(follow_symlinks=False) for one in entries}
    except OSError:
      continue
    seen += 1
    if seen > MAX_DIRECTORIES or depth > MAX_DEPTH:
      yield _MANY, ""
      return
    files = [".git"] if ".git" in names and not names[".git"] else []
    if "HEAD" in names and ("refs" in names or "commondir" in names):  # a repository's own files
      files += [name for name in _OBEYED if name in names]
      files += _hooks(os.path.join(root, top))
    waiting += [(os.path.join(top, name), depth + 1) for name, is_dir in names.items() if is_dir]
    for name in files:
      path = os.path.normpath(os.path.join(top, name))
      yield path, _said(os.path.join(root, path))


def _hooks(repository: str) -> list[str]:
  place = os.path.join(repository, "hooks")
  if os.path.islink(place):
    return ["hooks"]
  try:
    return [f"hooks/{name}" for name in os.listdir(place) if not name.endswith(".sample")]
  except OSError:
    return []


def _said(path: str) -> str:
  """What a file says, in short; where a link leads; its kind where it is neither."""
  try:
    if os.path.islink(path):
      return os.readlink(path)
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
      if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return hashlib.sha256(file.read(_MAX_READ)).hexdigest()
  except OSError:
    pass
  return "?"
