"""Lossless compression: what leaves the context stays in a file, and a pointer says where.

`Spill` acts on a result before the model sees it, so it edits nothing. `Lossless` acts on a context
that has to shrink: reads that were superseded are dropped, then long results of older turns are
moved to files. A read is superseded by the same read later on, and by any change of its file that
went through a tool; changes by shell commands are not seen.

Choice: a file's name is the digest of what it holds. The same output is kept once, and names do not
depend on the order in which calls of one reply end.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rome.agent.context import Context
from rome.agent.loop import Skill
from rome.agent.model import Call, Message
from rome.agent.tools.base import READ, WRITE, Tool, ToolResult
from rome.agent.workspace import Refused, Workspace

OUTPUTS = ".rome/outputs"  # in the root of a workspace
_MAX_KEPT = 8 << 20  # bytes of one output that go to a file


def keep(workspace: Workspace, text: str) -> str:
  """Puts text into a file of the workspace.

  Returns:
    Its path, or "" where it could not be written: the agent's disk may be full.
  Raises:
    SandboxError: the sandbox failed.
  """
  data = text.encode("utf-8", "replace")[:_MAX_KEPT]
  path = f"{workspace.root}/{OUTPUTS}/{hashlib.sha256(data).hexdigest()[:8]}.txt"
  try:
    return workspace.write(path, data)
  except Refused:
    return ""


def ends(text: str, size: int, where: str) -> str:
  """The first and the last of a text, cut at lines where there are some, and what is between.

  Args:
    text: longer than `size`.
    size: characters that are kept, about.
    where: the file that has all of it, "" for none.
  """
  head, tail = text[: size // 2], text[len(text) - size // 2 :]
  if (at := head.rfind("\n")) > size // 4:
    head = head[: at + 1]
  if 0 <= (at := tail.find("\n")) < size // 4:
    tail = tail[at + 1 :]
  left = len(text) - len(head) - len(tail)
  told = f"; all of it is in {where}" if where else ""
  return f"{head.rstrip()}\n[... {left} characters left out{told} ...]\n{tail.lstrip()}"


class Spill:
  """Observer of an executor: long outputs go to files.

  Args:
    workspace: where they go.
    limit: characters that a result may have.
    size: characters of a longer one that the model gets, half from each end.
  """

  def __init__(self, workspace: Workspace, limit: int = 8000, size: int = 2000):
    if not 0 < size <= limit:
      raise ValueError(f"Spill: size must be in 1..limit, got size={size}, limit={limit}")
    self._workspace, self._limit, self._size = workspace, limit, size

  def __call__(self, tool: Tool, arguments: dict[str, Any], result: ToolResult) -> ToolResult:
    if len(result.text) <= self._limit:
      return result
    path = result.facts.get("spilled") or keep(self._workspace, result.text)
    facts = {**result.facts, "truncated": True} | ({"spilled": path} if path else {})
    return dataclasses.replace(result, text=ends(result.text, self._size, path), facts=facts)


class Lossless(Skill):
  """Edits that lose nothing: see the module.

  Args:
    workspace: where long results go.
    tools: those of the executor, by name: their kind tells reads from changes.
    limit: characters that a result of an older turn may keep.
    recent: turns, the last ones, that stay as they are.
  """

  def __init__(
    self, workspace: Workspace, tools: Mapping[str, Tool], limit: int = 400, recent: int = 2
  ):
    if limit < 1 or recent < 0:
      raise ValueError(f"Lossless: limit >= 1 and recent >= 0, got {limit} and {recent}")
    self.workspace = workspace
    self._tools, self._limit, self._recent = tools, limit, recent
    self._reads: dict[tuple[str, str], str] = {}  # path and arguments -> id of the last such call
    self._stale: dict[str, str] = {}  # id of a call -> why its result is not needed

  def after(
    self, context: Context, calls: Sequence[Call], results: Sequence[ToolResult]
  ) -> Sequence[str]:
    for call, result in zip(calls, results, strict=True):
      path = result.facts.get("path")
      if not path or result.outcome != "ok":
        continue
      kind = self._tools[call.name].kind
      if kind == WRITE:
        for key in [key for key in self._reads if key[0] == path]:
          self._stale[self._reads.pop(key)] = "changed since"
      elif kind == READ:
        key = path, _canonical(call.arguments)
        if key in self._reads:
          self._stale[self._reads[key]] = "read again below"
        self._reads[key] = call.id
    return ()

  def edit(self, messages: Sequence[Message]) -> list[Message]:
    """The same conversation, calls included, with results that are shorter or the same."""
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    edge = [0, *turns, len(messages)][max(len(turns) + 1 - self._recent, 0)]
    found = [self._dropped(message) for message in messages[:edge]]
    return [*shortened(found, self._limit, self.workspace), *messages[edge:]]

  def _dropped(self, message: Message) -> Message:
    if not (why := self._stale.get(message.get("tool_call_id", ""))):
      return message
    told = f"[dropped: {why}]"
    return {**message, "content": told} if len(told) < len(message["content"]) else message


def shortened(
  messages: Sequence[Message], limit: int, workspace: Workspace | None
) -> list[Message]:
  """Messages whose results have about `limit` characters; what is cut goes to a file."""
  found = []
  for message in messages:
    text = message["content"]
    if message["role"] == "tool" and len(text) > limit:
      short = ends(text, limit // 2, keep(workspace, text) if workspace else "")
      if len(short) < len(text):
        message = {**message, "content": short}
    found.append(message)
  return found


def _canonical(arguments: str) -> str:
  try:
    return json.dumps(json.loads(arguments or "{}"), sort_keys=True)
  except ValueError:
    return arguments
