"""Detection of loops and of failing tools: a warning that names it, then an end.

A turn is *stale* when it brings nothing new: each of its calls was made before in this context with
the same result, or it is a reply without calls that was given before. That covers the same call
again and again, and pairs and longer cycles that alternate. A tool *fails* when its calls come to
the same error, whatever their arguments. Times, durations and addresses in a result do not make it
new, so that a clock does not hide a loop; other numbers do, as they may be progress.

Choice: waiting for something with the same command is a loop, too; after the warning a policy can
wait longer in one call. A rewrite of the context begins anew, as what was dropped may be read
again, and so does an instruction.
"""

import hashlib
import json
import re
from collections.abc import Sequence

from rome.agent.context import Context
from rome.agent.loop import Skill, Steps, reminder
from rome.agent.model import Call
from rome.agent.skills.compress import is_instruction
from rome.agent.tools.base import ToolResult

LOOP = "loop_detected"
# Begins where a number begins: of a long one, trying every digit would take its length squared.
_CLOCK = re.compile(
  r"0x[0-9a-f]+|(?<!\d)(?:\d+:\d\d(:\d\d)?(\.\d+)?"
  r"|\d+(\.\d+)? ?(s|ms|us|µs|secs?|seconds?|minutes?)\b)"
)
_END = 10_000  # characters of a long result that are compared, from each end
_CYCLE = 4  # calls of a loop that a warning names


class Detect(Skill):
  """See the module.

  Args:
    repeats: stale turns in a row, or equal errors of a tool in a row, that bring a warning.
    patience: stale turns behind the first warning that end the episode, 0 for never.
  """

  def __init__(self, repeats: int = 3, patience: int = 6):
    if repeats < 1 or patience < 0:
      raise ValueError(f"Detect: repeats >= 1 and patience >= 0, got {repeats} and {patience}")
    self._repeats, self._patience = repeats, patience
    self._forget(row=0)
    self._turn = 0

  def _forget(self, row: int) -> None:
    self._row = row
    self._seen: set[bytes] = set()  # digests of calls and results
    self._stale: list[str] = []  # what the stale turns in a row were
    self._errors: dict[str, tuple[str, int]] = {}  # tool -> error, how often in a row

  def before(self, context: Context) -> Steps:
    if context.row != self._row or is_instruction(context.messages[-1]):
      self._forget(context.row)
    elif context.turns > self._turn:  # a reply without calls: `after` was not asked
      last = next((m for m in reversed(context.messages) if m["role"] == "assistant"), None)
      text = last["content"] if last else ""
      if told := self._take([f"the reply {text[:80]!r}"], [f"reply {text}"]):
        context.append([{"role": "user", "content": reminder(told)}])
    self._turn = context.turns
    yield from ()

  def after(
    self, context: Context, calls: Sequence[Call], results: Sequence[ToolResult]
  ) -> Sequence[str]:
    self._turn = context.turns
    if context.row != self._row:
      self._forget(context.row)
    names = [_named(call) for call in calls]
    keys = [f"{_exact(c)}\n{_plain(r.text)}" for c, r in zip(calls, results, strict=True)]
    told = [self._take(names, keys), *self._failing(calls, results)]
    return [text for text in told if text]

  def end(self, context: Context) -> str:
    over = self._patience and len(self._stale) >= self._repeats + self._patience
    return LOOP if over else ""

  def _take(self, names: Sequence[str], keys: Sequence[str]) -> str:
    """Takes a turn in.

    Returns:
      A warning, "" where there is nothing to warn of.
    """
    digests = {hashlib.sha256(key.encode("utf-8", "replace")).digest() for key in keys}
    new = digests - self._seen
    self._seen |= new
    if new:
      self._stale.clear()
      return ""
    self._stale += [" and ".join(names[:_CYCLE])]
    if len(self._stale) < self._repeats:
      return ""
    distinct = list(dict.fromkeys(self._stale))[:_CYCLE]
    told = f"The last {len(self._stale)} turns brought nothing new: {', then '.join(distinct)}."
    left = self._repeats + self._patience - len(self._stale)
    if self._patience:
      told += f" After {left} more like them the episode ends." if left > 0 else " It ends here."
    return f"{told} Do something else, or give your answer."

  def _failing(self, calls: Sequence[Call], results: Sequence[ToolResult]) -> list[str]:
    found = []
    for call, result in zip(calls, results, strict=True):
      if result.outcome == "ok":
        self._errors.pop(call.name, None)
        continue
      text = _plain(result.text)
      error, times = self._errors.get(call.name, ("", 0))
      times = times + 1 if error == text else 1
      self._errors[call.name] = text, times
      if times % self._repeats == 0:
        found.append(
          f"{call.name} failed {times} times in a row with the same error:"
          f" {result.text[:200]}\nUse it differently, or another tool."
        )
    return found


def _exact(call: Call) -> str:
  try:
    arguments = json.dumps(json.loads(call.arguments or "{}"), sort_keys=True)
  except (RecursionError, ValueError):
    arguments = call.arguments
  return f"{call.name} {arguments}"


def _named(call: Call) -> str:
  text = f"{call.name}({call.arguments})"
  return text if len(text) <= 120 else f"{text[:117]}...)"


def _plain(text: str) -> str:
  """A result without its times; of a long one its ends."""
  if len(text) > 2 * _END:
    text = text[:_END] + text[-_END:]
  return _CLOCK.sub("#", text)
