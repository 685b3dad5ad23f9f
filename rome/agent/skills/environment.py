"""Environment management: tells the agent what somebody else changed under it.

Once a turn, behind the calls, one command looks at the files that the agent has read or written and
at those that git says are modified. What differs from the last look is told, unless it was the
agent: its tools name the files that they write, and what its commands change has a ctime, which no
program can set, that lies within the turn's calls. The command gives the sandbox's clock, too, so
that clocks need not agree.

Bounds: what others change while a command of the agent runs counts as its own, and so does what is
gone behind a turn with commands; what it left running in the background counts as others'. Left
out: new files that git does not track. Content is not compared, so a file that was only touched is
told as well.
"""

import posixpath
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from rome.agent.context import Context
from rome.agent.loop import Skill
from rome.agent.model import Call
from rome.agent.tools.base import EXECUTE, WRITE, Tool, ToolResult
from rome.agent.workspace import Refused, Workspace

_MAX_FILES = 60  # that are watched, the last ones that the agent touched
_MAX_TOLD = 8
_TOLERANCE = 0.02  # seconds; the kernel's stamps come from a clock that ticks every 4 ms or so
_HAS_GIT = 'cd -- "$1" && git rev-parse --is-inside-work-tree'
# $1: the root, $2: "git" or "", the rest: files. %z has the fraction of %Z, in busybox as well.
_LOOK = """
echo "now ${EPOCHREALTIME:-$(date +%s)}"
cd -- "$1" && command -v stat >/dev/null || exit 1
[ -z "$2" ] || mapfile -t g < <(
  git --no-optional-locks -c core.quotePath=off diff --name-only --relative | head -n 60)
shift 2
for f; do [ -e "$f" ] || echo "gone $f"; done
stat -c '%Z %z %s %i %n' -- "$@" "${g[@]/#/$PWD/}"
echo end
"""

Stamp = tuple[float, str]  # ctime; size and inode


class _Look(NamedTuple):
  files: dict[str, Stamp | None]  # None where it is gone
  ahead: float  # seconds by which the sandbox's clock is ahead


class Environment(Skill):
  """See the module. Its `gate` belongs among the executor's, so that it knows when calls began.

  Args:
    workspace: the agent's.
    timeout: seconds of one look; after one that takes longer there is none.
  """

  def __init__(self, workspace: Workspace, timeout: float = 2.0):
    self._workspace, self._timeout = workspace, timeout
    self._git: str | None = None  # "git" where there is a repository, "" where not
    self._off = self._lost = False
    self._watched: dict[str, None] = {}  # in the order in which the agent touched them
    self._known: dict[str, Stamp | None] = {}  # at the last look
    self._began: float | None = None
    self._kinds: dict[str, str] = {}

  def gate(self, tool: Tool, arguments: dict[str, Any]) -> None:
    """Notes that a call begins."""
    if self._began is None:
      self._began = time.time()
    self._kinds[tool.name] = tool.kind

  def begin(self, context: Context) -> None:
    try:
      found = self._workspace.ask(_HAS_GIT, self._workspace.root, timeout=self._timeout)
    except Refused:
      self._git = ""
      return
    self._git = "git" if found.data.strip() == b"true" else ""
    if self._git and (look := self._look()):
      self._known = look.files

  def after(
    self, context: Context, calls: Sequence[Call], results: Sequence[ToolResult]
  ) -> Sequence[str]:
    began, ended, self._began = self._began, time.time(), None
    told = [
      f"{call.name} was stopped at its time limit: what it had begun may be half done."
      for call, result in zip(calls, results, strict=True)
      if result.outcome == "timeout"
    ]
    if self._git is None:  # a conversation that goes on from a file
      self.begin(context)
    kinds = [self._kinds.get(call.name, "") for call in calls]
    if EXECUTE in kinds:
      told += self._directory()
    own = self._touch(kinds, results)
    if self._off or not (self._watched or self._git) or (look := self._look()) is None:
      return told
    span = (began, ended) if began is not None and EXECUTE in kinds else None
    changes = self._changes(look, own, span)
    listed = dict.fromkeys(self._watched) | look.files
    self._known = {path: look.files.get(path, self._known.get(path)) for path in listed}
    return [*told, _sentence(changes)] if changes else told

  def _directory(self) -> list[str]:
    """Tells once that the shell's directory is gone."""
    before, self._lost = self._lost, False
    try:
      self._workspace.cwd()
    except Refused as error:
      self._lost = True
      return [] if before else [str(error)]
    return []

  def _touch(self, kinds: Sequence[str], results: Sequence[ToolResult]) -> set[str]:
    """Watches what the calls touched; returns what they changed, and what is watched only now."""
    own = set()
    for kind, result in zip(kinds, results, strict=True):
      if path := result.facts.get("path"):
        path = posixpath.join(self._workspace.root, path)
        if kind == WRITE or path not in self._known:
          own.add(path)
        self._watched.pop(path, None)
        self._watched[path] = None
    self._watched = dict.fromkeys(list(self._watched)[-_MAX_FILES:])
    return own

  def _changes(self, look: _Look, own: set[str], span: tuple[float, float] | None) -> list[str]:
    """What others changed.

    Args:
      own: paths whose change is no news.
      span: when commands of the agent ran, by this machine's clock; None if none did.
    """
    found = []
    for path, new in look.files.items():
      if new == self._known.get(path) or path in own:
        continue
      if new is None and span:
        continue  # a command may have removed it
      if new and span:
        at = new[0] - look.ahead
        if span[0] - _TOLERANCE <= at <= span[1] + _TOLERANCE:
          continue
      name = posixpath.relpath(path, self._workspace.root)
      found.append(f"{name if name[:2] != '..' else path} ({'changed' if new else 'gone'})")
    return found

  def _look(self) -> _Look | None:
    """How things are; None where that cannot be told."""
    files = [path for path in self._watched if "\n" not in path]
    start = time.time()
    try:
      answer = self._workspace.ask(
        _LOOK, self._workspace.root, self._git or "", *files, timeout=self._timeout
      )
    except Refused:
      self._off = True
      return None
    end = time.time()
    first, *lines = answer.data.decode("utf-8", "surrogateescape").split("\n")
    if answer.cut or "end" not in lines:
      return None
    try:
      now, found = float(first.removeprefix("now ")), _stamps(lines)
    except ValueError:  # the agent's processes can write into it
      return None
    return _Look(found, 0.0 if start - 1 <= now <= end + 1 else now - (start + end) / 2)


def _stamps(lines: Sequence[str]) -> dict[str, Stamp | None]:
  """What a look says of each file.

  Raises:
    ValueError: it is garbled.
  """
  found: dict[str, Stamp | None] = {}
  for line in lines:
    if line.startswith("gone "):
      found[line.removeprefix("gone ")] = None
    elif len(parts := line.split(" ", 6)) == 7:
      whole, _, clock, _, size, inode, path = parts
      fraction = clock.partition(".")[2] or "0"
      found[path] = float(f"{whole}.{fraction}"), f"{size} {inode}"
  return found


def _sentence(changes: Sequence[str]) -> str:
  more = f" and {len(changes) - _MAX_TOLD} more" if len(changes) > _MAX_TOLD else ""
  files = ", ".join(changes[:_MAX_TOLD])
  return f"Somebody else changed files: {files}{more}. Look again before you rely on what you read."
