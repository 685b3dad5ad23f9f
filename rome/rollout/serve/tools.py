"""Tool calls in the text of a reply, in the format of Hermes and Qwen:

    <tool_call>
    {"name": "sh", "arguments": {"command": "ls"}}
    </tool_call>

Model output is data: what is not a well-formed call stays text, letter by letter. Choice: a call
that is not closed stays text, as it may have been cut off; white space in front of a call, and
behind the last one, is layout and is dropped; which names exist is the client's business; calls
inside <think> are calls like any other. Left out: the formats of Llama and Mistral, and arguments
in XML.
"""

import dataclasses
import json
import uuid
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclasses.dataclass(frozen=True)
class Call:
  """A well-formed call; `arguments` is a JSON object, as text."""

  id: str
  name: str
  arguments: str

  def message(self) -> dict[str, Any]:
    """As in an assistant's `tool_calls`."""
    function = {"name": self.name, "arguments": self.arguments}
    return {"id": self.id, "type": "function", "function": function}


class ToolParser:
  """Takes a reply apart as it comes; whole or in pieces, the outcome is the same.

  Attributes:
    count: calls so far.
  """

  def __init__(self) -> None:
    self.count = 0
    self._rest = ""  # text that is not decided yet
    self._space = ""  # white space in front of it
    self._inside = False  # whether it lies behind an opening tag
    self._seen = 0  # characters of it in which no closing tag begins
    self._after_call = False  # whether a call was the last thing that came out

  def push(self, text: str, last: bool = False) -> tuple[str, list[Call]]:
    """Takes more text.

    Args:
      text: what follows.
      last: whether nothing follows this.
    Returns:
      Content that is certain, and calls that are complete.
    """
    self._rest += text
    content: list[str] = []
    calls: list[Call] = []
    while True:
      if not self._inside:
        if not self._find_open(content, last):
          break
      elif (found := self._find_close(last)) is None:
        break
      elif isinstance(found, Call):
        self._inside, self._space, self._after_call = False, "", True
        self.count += 1
        calls.append(found)
      else:  # malformed: the tag was text
        self._inside = False
        self._emit(content, OPEN)
    return "".join(content), calls

  def _emit(self, content: list[str], text: str) -> None:
    """Puts out white space that was held back, and the text without its own."""
    solid = text.rstrip()
    if solid:
      content.append(self._space + solid)
      self._space, self._after_call = "", False
    self._space += text[len(solid) :]

  def _find_open(self, content: list[str], last: bool) -> bool:
    before, tag, after = self._rest.partition(OPEN)
    if tag:
      self._emit(content, before)
      self._rest, self._inside, self._seen = after, True, 0
      return True
    held = 0 if last else _overlap(self._rest)
    self._emit(content, self._rest[: len(self._rest) - held])
    self._rest = self._rest[len(self._rest) - held :]
    if last and self._space and not self._after_call:
      content.append(self._space)
      self._space = ""
    return False

  def _find_close(self, last: bool) -> Call | bool | None:
    """The call, False where it cannot become one, None where more text is needed."""
    if (start := self._rest.lstrip()) and start[0] != "{":
      return False
    while (end := self._rest.find(CLOSE, self._seen)) >= 0:
      call = _parse(self._rest[:end])
      if isinstance(call, Call):
        self._rest = self._rest[end + len(CLOSE) :]
        return call
      if not call:
        return False
      self._seen = end + 1  # the tag was in a string
    self._seen = max(self._seen, len(self._rest) - len(CLOSE) + 1)
    return False if last else None


def _overlap(text: str) -> int:
  """How long the end of `text` is that an opening tag may begin with."""
  for length in range(min(len(text), len(OPEN) - 1), 0, -1):
    if text.endswith(OPEN[:length]):
      return length
  return 0


def _parse(body: str) -> Call | bool:
  """The call in `body`; else whether more text could make it one: it ends within a string."""
  try:
    found = json.loads(body, parse_constant=_refuse)
    match found:
      case {"name": str() as name, "arguments": dict() as arguments} if name:
        text = json.dumps(arguments, ensure_ascii=False)
        return Call(f"call_{uuid.uuid4().hex[:24]}", name, text)
  except json.JSONDecodeError as e:
    return e.msg.startswith("Unterminated string")
  except (RecursionError, ValueError):
    pass
  return False


def _refuse(value: str) -> None:
  raise ValueError(f"{value} is no JSON")
