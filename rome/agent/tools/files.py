"""Files: read, write, edit, multi_edit. What may be done to a path `Workspace` decides.

A result's `facts` name the resolved path. Left out: pictures and notebooks.
"""

from collections.abc import Callable
from typing import Any

from rome.agent.tools import show
from rome.agent.tools.base import READ, WRITE, Tool, ToolResult, parameters
from rome.agent.tools.edits import replace_all
from rome.agent.workspace import File, Refused, Workspace

LINES = 2000  # that a read shows where the model names no number
LINE = 2000  # characters of a line that are shown
MAX_EDITS = 100

_PATH = {"type": "string", "description": "of the file; relative to the shell's directory"}
_OLD = {"type": "string", "description": "the text to replace, exactly as in the file"}
_NEW = {"type": "string", "description": "the text in its place"}
_ALL = {"type": "boolean", "description": "replace every place; without it old must be unique"}


def file_tools(workspace: Workspace) -> list[Tool]:
  """The tools `read`, `write`, `edit` and `multi_edit`."""

  def read(arguments: dict[str, Any]) -> ToolResult:
    file = workspace.read(arguments["path"])
    first, count = int(arguments.get("offset", 1)), int(arguments.get("limit", LINES))  # 1.0 is 1
    text, more = page(file.data, first, count, workspace.shown)
    workspace.seen[file.path] = file.digest
    return ToolResult(text, facts={"path": file.path, "digest": file.digest, "truncated": more})

  def write(arguments: dict[str, Any]) -> ToolResult:
    path, data = arguments["path"], encode(arguments["content"])
    found = workspace.write(path, data)
    text = f"wrote {show.name(path)}, {len(data)} bytes"
    return ToolResult(text, facts={"path": found})

  def edit(arguments: dict[str, Any]) -> ToolResult:
    return change(workspace, arguments["path"], [arguments])

  def multi_edit(arguments: dict[str, Any]) -> ToolResult:
    return change(workspace, arguments["path"], arguments["edits"])

  one = parameters({"old": _OLD, "new": _NEW}, all=_ALL)
  several = {"type": "array", "items": one, "minItems": 1, "maxItems": MAX_EDITS}
  number = {"type": "integer", "minimum": 1, "maximum": 10**9}
  offset = {**number, "description": "first line, 1 by default"}
  limit = {**number, "description": f"lines, {LINES} by default"}
  content = {"type": "string", "description": "all of the file"}
  return [
    Tool(
      "read",
      "Reads a text file. Each line is shown behind its number and a tab.",
      parameters({"path": _PATH}, offset=offset, limit=limit),
      careful(read),
      READ,
      parallel=True,
      subject=_path,
    ),
    Tool(
      "write",
      "Writes a whole file, new or in the place of what is there. Directories are made as needed.",
      parameters({"path": _PATH, "content": content}),
      careful(write),
      WRITE,
      subject=_path,
    ),
    Tool(
      "edit",
      "Replaces a text in a file. It must be there exactly once; take lines around it along.",
      parameters({"path": _PATH, "old": _OLD, "new": _NEW}, all=_ALL),
      careful(edit),
      WRITE,
      subject=_path,
    ),
    Tool(
      "multi_edit",
      "Makes several edits of one file in order, each in what the one before it left: "
      "all of them, or none where one cannot be made.",
      parameters({"path": _PATH, "edits": several}),
      careful(multi_edit),
      WRITE,
      subject=_path,
    ),
  ]


def careful(
  work: Callable[[dict[str, Any]], ToolResult],
) -> Callable[[dict[str, Any]], ToolResult]:
  """The work of a tool, with a refusal of the workspace as its result."""

  def run(arguments: dict[str, Any]) -> ToolResult:
    try:
      return work(arguments)
    except Refused as error:
      return ToolResult(f"error: {error}", error.outcome)

  return run


def page(data: bytes, first: int, count: int, most: int) -> tuple[str, bool]:
  """Lines of a file as `read` shows them, and whether there are more behind them.

  Args:
    data: the file.
    first: the first line, from 1.
    count: lines.
    most: characters in all.
  Raises:
    Refused: it is no text, or has no such line.
  """
  if b"\0" in data[:8192]:
    raise Refused(f"it is a binary file of {len(data)} bytes; use the shell (od, strings)")
  if not data:
    return "[the file is empty]", False
  data = data.removesuffix(b"\n")
  total = data.count(b"\n") + 1
  if first > total:
    raise Refused(f"there is no line {first}; the file has {total} lines")
  count = min(count, most)  # each takes a character at least
  lines = data.split(b"\n", first - 1)[-1].split(b"\n", count)[:count]
  shown: list[str] = []
  room = most
  for number, line in enumerate(lines, first):
    text, _ = show.cut(show.decode(line.removesuffix(b"\r")), LINE)
    text = f"{number}\t{text}"
    room -= len(text) + 1
    if room < 0 and shown:
      break
    shown.append(text)
  last = first + len(shown) - 1
  if lines[0].endswith(b"\r"):
    shown.append("[lines end in CRLF]")
  if more := last < total:
    shown.append(f"[lines {first} to {last} of {total}; go on with offset={last + 1}]")
  return "\n".join(shown), more


def change(workspace: Workspace, path: str, edits: list[dict[str, Any]]) -> ToolResult:
  """Edits a file; one that somebody changes meanwhile is left as it is."""
  told = show.name(path)
  file: File = workspace.read(path)
  shown = workspace.seen.get(file.path, file.digest)
  text = file.data.decode("utf-8", "surrogateescape")
  try:
    text, lines = replace_all(text, edits)
    found = workspace.write(path, encode(text), expected=file.digest)
  except Refused as error:
    message = str(error)
    raise Refused(message if told in message else f"{told}: {message}", error.outcome) from error
  said = f"edited {told}, line {', '.join(map(str, lines))}"
  if shown != file.digest:
    said += "; somebody had changed the file since you read it"
  return ToolResult(said, facts={"path": found})


def encode(text: str) -> bytes:
  r"""A file's bytes; `\udcXX` stands for a byte that is no UTF-8.

  Raises:
    Refused: other unpaired surrogates.
  """
  try:
    return text.encode("utf-8", "surrogateescape")
  except UnicodeEncodeError as error:
    raise Refused("the text holds an unpaired surrogate", "invalid_arguments") from error


def _path(arguments: Any) -> str:
  return str(arguments["path"])
