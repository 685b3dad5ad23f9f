"""What the agent keeps for itself between sessions: a list of tasks, and facts of the project.

Both are plain files of the project that people read and edit too: `.rome/todo.md` with a line of
markdown for each task (`- [ ]`, `- [~]` for one under way, `- [x]`), and `ROME.md`, in which facts
are lines that begin with `- `. What else is in `ROME.md` stays as it is.
"""

import re
from typing import Any

from rome.agent.tools import show
from rome.agent.tools.base import NOTE, Tool, ToolResult, parameters
from rome.agent.tools.files import careful, encode
from rome.agent.workspace import Refused, Workspace

TODO, MEMORY = ".rome/todo.md", "ROME.md"
STATES = {"pending": " ", "in_progress": "~", "done": "x"}
MAX_ITEMS = 100
MAX_LENGTH = 500  # characters of a task or fact

_ITEM = re.compile(r"^- \[([ ~x])\] (.+)$", re.MULTILINE)


def note_tools(workspace: Workspace) -> list[Tool]:
  """The tools `todo` and `memory`."""

  def todo(arguments: dict[str, Any]) -> ToolResult:
    if (items := arguments.get("items")) is not None:
      said = [f"- [{STATES[item['state']]}] {_line(item['text'])}\n" for item in items]
      workspace.write(_in(workspace, TODO), encode("".join(said)))
    return ToolResult(_items(workspace) or "[the list is empty]")

  def memory(arguments: dict[str, Any]) -> ToolResult:
    path, fact = _in(workspace, MEMORY), f"- {_line(arguments['fact'])}"
    before = workspace.find(path)
    lines = before.data.decode("utf-8", "surrogateescape").splitlines() if before else []
    if arguments["action"] == "add":
      if fact in lines:
        return ToolResult("it is there already")
      lines.append(fact)
    elif fact in lines:
      lines = [line for line in lines if line != fact]
    else:
      known = "\n".join(show.clean(line) for line in lines if line.startswith("- "))
      raise Refused(f"no such fact; there are:\n{known or 'none'}")
    data = encode("".join(f"{line}\n" for line in lines))
    workspace.write(path, data, expected=before.digest if before else "")
    return ToolResult(f"{'noted' if arguments['action'] == 'add' else 'removed'} in {MEMORY}")

  text = {"type": "string", "minLength": 1, "maxLength": MAX_LENGTH}
  state = {"type": "string", "enum": list(STATES)}
  item = parameters({"text": text, "state": state})
  items = {"type": "array", "items": item, "maxItems": MAX_ITEMS, "description": "the whole list"}
  action = {"type": "string", "enum": ["add", "remove"]}
  return [
    Tool(
      "todo",
      "Your list of tasks. With items it is replaced, without it is read. Write one for work of "
      "several steps, keep one task in_progress, and set tasks done as soon as they are.",
      parameters({}, items=items),
      careful(todo),
      NOTE,
    ),
    Tool(
      "memory",
      f"Adds a fact about this project to {MEMORY}, or removes one; you are told them in every "
      "later session. One line, true for long: commands that work, conventions, decisions.",
      parameters({"action": action, "fact": text}),
      careful(memory),
      NOTE,
    ),
  ]


def read_todo(workspace: Workspace) -> str:
  """The list of tasks as `todo` shows it, "" where there is none or it cannot be read.

  Raises:
    SandboxError: the sandbox failed.
  """
  try:
    return _items(workspace)
  except Refused:  # the agent may put anything in its place, a directory for one
    return ""


def _items(workspace: Workspace) -> str:
  found = workspace.find(_in(workspace, TODO))
  lines = _ITEM.findall(show.decode(found.data)) if found else []
  return "\n".join(f"- [{state}] {text[:MAX_LENGTH]}" for state, text in lines[:MAX_ITEMS])


def _in(workspace: Workspace, name: str) -> str:
  return f"{workspace.root.rstrip('/')}/{name}"


def _line(text: str) -> str:
  """The text as one line."""
  return " ".join(text.split())
