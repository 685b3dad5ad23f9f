"""Finding files: glob, search, list, by bash, find, grep and stat of the sandbox.

They run as the agent's user and for so many seconds at most, so that no pattern and no tree holds
an episode up: a regular expression that backtracks forever is stopped. Python's own `re` on the
host could not be.

Left out: PCRE (a base image has none) and `.gitignore`.
"""

import os
import posixpath
import re
from typing import Any

from rome.agent.tools import show
from rome.agent.tools.base import READ, Tool, ToolResult, parameters
from rome.agent.tools.files import careful
from rome.agent.workspace import Answer, Refused, Workspace, check, number

MOST = 200  # names or lines of a result
LINE = 400  # bytes of a line found, its path with it
TIMEOUT = 20.0  # seconds
PRUNED = (".git", "node_modules", "__pycache__", ".venv")  # directories that a search passes by

_GLOB = """
[ -d "$1" ] || exit 2
cd "$1" || exit 13
shopt -s globstar extglob nullglob
IFS=
names=( $2 )
n=${names[0]}  # a pattern without wildcards stands for itself, there or not
[ "${#names[@]}" = 1 ] && [ ! -e "$n" ] && [ ! -L "$n" ] && names=()
printf '%s\\0' "${#names[@]}" "${names[@]:0:$3}"
"""
_LIST = """
[ -e "$1" ] || exit 2
[ -d "$1" ] || exit 20
cd "$1" && [ -r . ] || exit 13
shopt -s dotglob nullglob
names=( * )
echo "${#names[@]}"
names=( "${names[@]:0:$2}" )
[ "${#names[@]}" = 0 ] || stat -c '%f %s' -- "${names[@]}"
printf '\\0%s' "${names[@]}"
"""
# Names with a line feed would pass for other lines. busybox's grep has no -I. Sorted, as the order
# of a file system is its own. Long lines would take the place of others.
_SEARCH = """
[ -e "$1" ] || exit 2
why=$(echo | grep -E -e "$2" 2>&1)
case $?$why in 0|1|[01]*warning:*) ;; *) echo "$why"; exit 99 ;; esac
text=; echo x | grep -qI x && text=-I
find -H "$1" -type d \\( {pruned} \\) ! -path "$1" -prune -o -type f -name "$3" \\
  ! -path $'*\\n*' -print0 | sort -z | xargs -0 -r grep -HnE -m {most} $text $4 $5 -e "$2" \
  | tr '\\0' '\\1' | sed -e $'/\\1/d' -e 's/^\\(.\\{{{line}\\}}\\).*/\\1 [...]/'
true
""".format(pruned=" -o ".join(f"-name {name}" for name in PRUNED), most=MOST, line=LINE)
_WHY = {2: "no such directory", 13: "permission denied", 20: "it is no directory; use read"}
_KINDS = {
  0x4000: "dir",
  0x8000: "file",
  0xA000: "link",
  0x1000: "pipe",
  0xC000: "socket",
}  # of the bits of a mode
_DIGIT = {r"\d": "[0-9]", r"\D": "[^0-9]"}


def find_tools(workspace: Workspace, timeout: float = TIMEOUT) -> list[Tool]:
  """The tools `glob`, `search` and `list`.

  Args:
    workspace: where.
    timeout: seconds that one of them may take.
  """

  def glob(arguments: dict[str, Any]) -> ToolResult:
    where = arguments.get("path", ".")
    pattern = _alternatives(arguments["pattern"])
    if pattern.startswith("/"):
      where, pattern = "/", pattern.lstrip("/")
    answer = _ask(workspace, timeout, where, _GLOB, _checked(pattern), str(MOST))
    said, *names = os.fsdecode(answer.data).split("\0")
    if not (count := number(said)):
      return ToolResult("[nothing matches]")
    return _result([show.name(_beneath(where, name)) for name in names[:-1]], count)

  def search(arguments: dict[str, Any]) -> ToolResult:
    where, context = arguments.get("path", "."), int(arguments.get("context", 0))
    pattern = re.sub(r"\\.", lambda m: _DIGIT.get(m[0], m[0]), arguments["pattern"])
    case = "-i" if arguments.get("ignore_case") else "-s"
    answer = _ask(
      workspace,
      timeout,
      where,
      _SEARCH,
      _checked(pattern),
      _checked(arguments.get("include", "*")),
      case,
      f"-C{context}" if context else "",
    )
    if answer.status == 99:
      raise Refused(f"no regular expression of grep -E: {show.decode(answer.data)[:200].strip()}")
    said = os.fsdecode(answer.data).rpartition("\n")[0]  # of what is cut, whole lines
    found = [line for line in said.split("\n") if line]
    if not found:
      return ToolResult("[nothing matches]")
    root = workspace.place(where)
    return _result([_line(line, where, root) for line in found], 0, answer.cut)

  def list_(arguments: dict[str, Any]) -> ToolResult:
    answer = _ask(workspace, timeout, arguments.get("path", "."), _LIST, str(MOST))
    head, *names = os.fsdecode(answer.data).split("\0")
    said, *stats = head.split("\n")
    if not (count := number(said)):
      return ToolResult("[the directory is empty]")
    return _result(_entries(stats[:-1], names[:-1] if answer.cut else names), count)

  path = {"type": "string", "description": "directory, by default the shell's"}
  anywhere = {"type": "string", "description": "directory or file, by default the shell's"}
  pattern = {"type": "string", "description": "as in bash: * ? [..] {a,b}, ** for directories"}
  regex = {"type": "string", "description": r"regular expression as of grep -E, \d \w \s \b too"}
  include = {"type": "string", "description": "only files whose name matches, such as *.py"}
  context = {"type": "integer", "minimum": 0, "maximum": 10, "description": "lines around each"}
  ignore_case = {"type": "boolean"}
  return [
    Tool(
      "glob",
      "Finds files and directories by name. Hidden ones only where the pattern says so.",
      parameters({"pattern": pattern}, path=path),
      careful(glob),
      READ,
      parallel=True,
      subject=_path,
    ),
    Tool(
      "search",
      "Searches the contents of files: path:line:text of each line that matches. "
      f"Binary files and {', '.join(PRUNED)} are passed by.",
      parameters(
        {"pattern": regex}, path=anywhere, include=include, ignore_case=ignore_case, context=context
      ),
      careful(search),
      READ,
      parallel=True,
      subject=_path,
    ),
    Tool(
      "list",
      "Lists a directory: kind, size in bytes and name of each entry.",
      parameters({}, path=path),
      careful(list_),
      READ,
      parallel=True,
      subject=_path,
    ),
  ]


def _entries(stats: list[str], names: list[str]) -> list[str]:
  """Lines of `list`; where one went meanwhile, nobody knows whose the others' sizes are."""
  if len(stats) < len(names):
    return [show.name(name) for name in names]
  lines = []
  for stat, name in zip(stats, names, strict=False):
    mode, _, size = stat.partition(" ")
    kind = _KINDS.get(number(mode, 16) & 0xF000, "device")
    lines.append(f"{kind:<6} {size if kind == 'file' else '-':>9} {show.name(name)}")
  return lines


def _ask(workspace: Workspace, timeout: float, where: str, script: str, *args: str) -> Answer:
  """An answer about a path, or a refusal that names it."""
  place = workspace.place(where)
  try:
    answer = workspace.ask(script, place, *args, timeout=timeout)
  except Refused as error:
    raise Refused(f"{show.name(where)}: {error}; narrow it down", error.outcome) from error
  if answer.status in _WHY:
    raise Refused(f"{show.name(where)}: {_WHY[answer.status]}")
  if not answer.data and answer.status not in (0, 99):
    raise Refused(f"{show.name(where)}: too much for the sandbox; narrow it down")
  return answer


def _result(lines: list[str], count: int, cut: bool = False) -> ToolResult:
  shown = lines[:MOST]
  if more := cut or len(lines) > MOST or count > len(shown):
    of = f"{len(shown)} of {count}" if count else f"the first {len(shown)} lines"
    shown = [*shown, f"[{of}; narrow it down]"]
  return ToolResult("\n".join(shown), facts={"truncated": bool(more)})


def _line(line: str, where: str, root: str) -> str:
  """A line of grep, with its path as the model would give it."""
  if line.startswith(root):
    line = (where + line[len(root) :]).removeprefix("./")
  raw = line.encode("utf-8", "surrogateescape")
  return show.decode(raw)


def _beneath(where: str, name: str) -> str:
  return name if where == "." else posixpath.join(where, name)


def _alternatives(pattern: str) -> str:
  """`{a,b}` as `@(a|b)`: bash expands braces before anything that comes out of a variable."""
  return re.sub(r"\{([^{}/]*,[^{}/]*)\}", lambda m: "@(" + m[1].replace(",", "|") + ")", pattern)


def _checked(text: str) -> str:
  """Text that a shell can be told."""
  if len(text) > 4000:
    raise Refused("the pattern is longer than 4000 characters", "invalid_arguments")
  check(text, "the pattern")
  return text


def _path(arguments: Any) -> str:
  return str(arguments.get("path", "."))
