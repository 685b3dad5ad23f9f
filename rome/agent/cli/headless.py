"""One instruction without a person: `rome agent -p "..."`.

--output text         the answer
--output json         one object: session, reason, text, turns, tokens
--output stream-json  a line for each thing that happens, as it happens; the last is that object
"""

import json
import sys
from typing import Any

from rome.agent.cli.conversation import Conversation
from rome.agent.cli.safe import line, safe
from rome.agent.loop import Outcome
from rome.agent.model import Call, ModelReply
from rome.agent.tools.base import Tool, ToolResult

ANSWERED, ERROR, USAGE, LIMIT, STOPPED = 0, 1, 2, 3, 130
FORMATS = ("text", "json", "stream-json")


class Headless:
  """The view without a person; see `conversation.View`."""

  def __init__(self, output: str):
    self._output = output

  def piece(self, kind: str, text: str) -> None:
    if kind in ("text", "thinking"):
      self.event(kind, text=text)
    elif kind == "again":
      self.event("again")

  def reply(self, reply: ModelReply) -> None:
    calls = [{"name": call.name, "arguments": call.arguments} for call in reply.calls]
    self.event("reply", content=reply.content, **reply.reasoning, calls=calls, finish=reply.finish)

  def result(self, call: Call, result: ToolResult) -> None:
    self.event("result", call=call.id, tool=call.name, outcome=result.outcome, text=result.text)

  def note(self, text: str) -> None:
    self.event("note", text=text)
    if self._output != "stream-json":
      print(f"rome agent: {line(text, 2000)}", file=sys.stderr)

  def ask(self, tool: Tool, arguments: dict[str, Any], why: str, diff: str) -> str:
    return "no"

  def event(self, kind: str, **fields: Any) -> None:
    if self._output == "stream-json":
      say({"type": kind, **fields})


def run(conversation: Conversation, instruction: str, output: str, view: Headless) -> int:
  """Carries the instruction out. Returns the exit code."""
  view.event("session", id=conversation.session.id, model=conversation.settings.model)
  outcome = conversation.say(instruction)
  if output == "text":
    if outcome.text:
      shown = safe(outcome.text) if sys.stdout.isatty() else outcome.text
      print(shown.encode("utf-8", "replace").decode(), flush=True)  # half a surrogate cannot be
    if outcome.reason != "answered":
      print(f"rome agent: ended without an answer: {outcome.reason}", file=sys.stderr)
  else:
    say(_told(conversation, outcome))
  return {"answered": ANSWERED, "stopped": STOPPED}.get(outcome.reason, LIMIT)


def fail(message: str, output: str) -> None:
  """Says what is wrong, once, in the form that was asked for."""
  if output != "text":
    say({"type": "outcome", "reason": "error", "text": message})
  print(f"rome agent: {line(message, 2000)}", file=sys.stderr)


def say(thing: dict[str, Any]) -> None:
  """A line of JSON."""
  print(json.dumps(thing), flush=True)


def _told(conversation: Conversation, outcome: Outcome) -> dict[str, Any]:
  usage = conversation.usage
  return {
    "type": "outcome",
    "session": conversation.session.id,
    "reason": outcome.reason,
    "text": outcome.text,
    "turns": outcome.turns,
    "tokens": {"prompt": usage.prompt, "completion": usage.completion},
  }
