"""Tool calls in the text of a reply. Two formats; `parser_for` takes the tokenizer's.

That of Hermes and Qwen:

    <tool_call>
    {"name": "shell", "arguments": {"command": "ls"}}
    </tool_call>

That of the byte tokenizer, for small policies, one call at the end of a reply: the special
`<|call|>`, the tool's name, a space and either the text of its first required argument or all
arguments as a JSON object:

    <|call|>shell ls

Model output is data: what is not a well-formed call stays text, letter by letter. Choice: a call
that is not closed stays text, as it may have been cut off; white space in front of a call, and
behind the last one, is layout and is dropped; which names exist is the client's business; calls
inside <think> are calls like any other. Left out: the formats of Llama and Mistral, and arguments
in XML.
"""

import dataclasses
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rome.text.tokenizer import Tokenizer

OPEN, CLOSE = "<tool_call>", "</tool_call>"
BARE = "<|call|>"
_MEANT = re.compile(rf"(?<!`)(?:{re.escape(OPEN)}|{re.escape(BARE)})")
MAX_DEPTH = 64  # of a call's JSON: what renders it as history recurses
Schemas = Sequence[Mapping[str, Any]]  # of tools, as in the OpenAI API


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


class CallParser(Protocol):
  """Takes a reply apart as it comes; whole or in pieces, the outcome is the same.

  Attributes:
    count: calls so far.
  """

  count: int

  def push(self, text: str, last: bool = False) -> tuple[str, list[Call]]:
    """Takes more text.

    Args:
      text: what follows.
      last: whether nothing follows this.
    Returns:
      Content that is certain, and calls that are complete.
    """


def parser_for(tokenizer: Tokenizer, tools: Schemas = ()) -> CallParser:
  """A parser for one reply in the format of the tokenizer's policies."""
  return BareParser(tools) if BARE in tokenizer.specials else ToolParser()


def parse_all(tokenizer: Tokenizer, tools: Schemas, text: str) -> tuple[str, list[Call]]:
  """Content and calls of a whole reply."""
  return parser_for(tokenizer, tools).push(text, last=True)


def looks_like_call(text: str) -> bool:
  """Whether content holds what was probably meant to be a call and is none.

  A tag right behind a backtick is spoken of: an answer may explain the format.
  """
  return _MEANT.search(text) is not None


def spell(tokenizer: Tokenizer, tools: Schemas, name: str, arguments: Mapping[str, Any]) -> str:
  """A call as its policy writes it: what `parse_all` reads."""
  text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
  if BARE not in tokenizer.specials:
    return f"{OPEN}\n{text}\n{CLOSE}"
  first = _first(tools, name)
  if list(arguments) == [first] and isinstance(value := arguments[first], str):
    if value and value == value.strip() and json_object(value) is None:
      return f"{BARE}{name} {value}".rstrip()
  return f"{BARE}{name} {json.dumps(arguments, ensure_ascii=False)}"


class BareParser:
  """Reads the byte tokenizer's format; see `CallParser`."""

  def __init__(self, tools: Schemas = ()) -> None:
    self.count = 0
    self._tools = tools
    self._held = ""

  def push(self, text: str, last: bool = False) -> tuple[str, list[Call]]:
    self._held += text
    before, tag, body = self._held.partition(BARE)
    if not tag and not last:
      at = len(self._held) - _overlap(self._held, BARE)
      content, self._held = self._held[:at], self._held[at:]
      return content, []
    if not last:  # the call goes to the end of the reply
      self._held = tag + body
      return before, []
    self._held = ""
    name, _, argument = body.partition(" ")
    if not tag or not name or BARE in body:
      return before + tag + body, []
    arguments = json_object(argument)
    if arguments is None:
      first = _first(self._tools, name)
      arguments = {first: argument} if argument else {}
    self.count = 1
    return before, [_call(name, arguments)]


def _first(tools: Schemas, name: str) -> str:
  """The argument of a tool that may be written bare."""
  for tool in tools:
    function = tool.get("function", {})
    if function.get("name") == name:
      parameters = function.get("parameters") or {}
      names = [*parameters.get("required", ()), *parameters.get("properties", ())]
      return str(names[0]) if names else "argument"
  return "argument"


def json_object(text: str) -> dict[str, Any] | None:
  """The object that a text is, None where it is none or nested deeper than `MAX_DEPTH`."""
  try:
    found = json.loads(text, parse_constant=_refuse)
  except (RecursionError, ValueError):
    return None
  return found if isinstance(found, dict) and not _deep(found) else None


def _deep(value: Any) -> bool:
  """Whether it is nested deeper than `MAX_DEPTH`."""
  level = [value]
  for _ in range(MAX_DEPTH):
    inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
    level = [item for items in inner for item in items]
  return any(isinstance(v, dict | list) for v in level)


def _call(name: str, arguments: Mapping[str, Any]) -> Call:
  text = json.dumps(arguments, ensure_ascii=False)
  return Call(f"call_{uuid.uuid4().hex[:24]}", name, text)


class ToolParser:
  """Reads the format of Hermes and Qwen; see `CallParser`."""

  def __init__(self) -> None:
    self.count = 0
    self._rest = ""  # text that is not decided yet
    self._space = ""  # white space in front of it
    self._inside = False  # whether it lies behind an opening tag
    self._seen = 0  # characters of it in which no closing tag begins
    self._after_call = False  # whether a call was the last thing that came out

  def push(self, text: str, last: bool = False) -> tuple[str, list[Call]]:
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
    held = 0 if last else _overlap(self._rest, OPEN)
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


def _overlap(text: str, tag: str) -> int:
  """How long the end of `text` is that the tag may begin with."""
  for length in range(min(len(text), len(tag) - 1), 0, -1):
    if text.endswith(tag[:length]):
      return length
  return 0


def _parse(body: str) -> Call | bool:
  """The call in `body`; else whether more text could make it one: it ends within a string."""
  try:
    found = json.loads(body, parse_constant=_refuse)
    match found:
      case {"name": str() as name, "arguments": dict() as arguments} if name and not _deep(found):
        return _call(name, arguments)
  except json.JSONDecodeError as e:
    return e.msg.startswith("Unterminated string")
  except (RecursionError, ValueError):
    pass
  return False


def _refuse(value: str) -> None:
  raise ValueError(f"{value} is no JSON")
