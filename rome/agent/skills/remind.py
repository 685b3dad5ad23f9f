"""Enhancement: restates the objective, and tells what got done and which tools came or went.

All of it is text behind results; nothing is said twice in a row. The objective is repeated every so
many turns, and in the turn after a context was rewritten: then it stands far above the last turns.
"""

from collections.abc import Callable, Collection, Sequence

from rome.agent.context import Context
from rome.agent.loop import Skill
from rome.agent.model import Call
from rome.agent.skills.compress import is_instruction
from rome.agent.tools.base import ToolResult

_DONE, _OPEN = ("[x]",), ("[~]", "[ ]")  # marks of an item, behind a bullet
_MAX_OPEN = 5  # items that are repeated with the objective
_MAX_OBJECTIVE = 2000  # characters of it that are repeated


class Remind(Skill):
  """See the module.

  Args:
    every: turns between two restatements of the objective, 0 for none but after a rewrite.
    todo: the todo list as `rome.agent.tools.notes.read_todo` gives it, "" for none; it is asked
      behind calls that name it, and with the objective.
    tools: names of the tools that there are now; None where they stay the same.
  """

  def __init__(
    self,
    every: int = 10,
    todo: Callable[[], str] = lambda: "",
    tools: Callable[[], Collection[str]] | None = None,
  ):
    if every < 0:
      raise ValueError(f"Remind: every must be at least 0, got {every}")
    self._every, self._todo, self._tools = every, todo, tools
    self._row = self._restated = 0
    self._done: frozenset[str] | None = None
    self._known: frozenset[str] | None = None

  def begin(self, context: Context) -> None:
    self._done = frozenset(_items(self._todo(), _DONE))
    self._known = frozenset(self._tools()) if self._tools else None

  def after(
    self, context: Context, calls: Sequence[Call], results: Sequence[ToolResult]
  ) -> Sequence[str]:
    noted = any("todo" in f"{call.name} {call.arguments}" for call in calls)
    return [*(self._finished() if noted else ()), *self._changed(), *self._objective(context)]

  def _finished(self) -> list[str]:
    text = self._todo()
    done, left = _items(text, _DONE), _items(text, _OPEN)
    new = [item for item in done if item not in (self._done or ())]
    self._done = frozenset(done)
    if not new:
      return []
    rest = f"Next: {left[0]} ({len(left)} left)" if left else "Nothing is left on the todo list"
    return [f"Done: {'; '.join(new)}. {rest}."]

  def _changed(self) -> list[str]:
    if self._tools is None:
      return []
    now, before = frozenset(self._tools()), self._known
    self._known = now
    if before is None or now == before:
      return []
    gone, came = sorted(before - now), sorted(now - before)
    told = [f"no longer there: {', '.join(gone)}"] if gone else []
    told += [f"new: {', '.join(came)}"] if came else []
    return [f"The tools have changed; {'; '.join(told)}."]

  def _objective(self, context: Context) -> list[str]:
    due = self._every and context.turns - self._restated >= self._every
    if not due and context.row == self._row:
      return []
    self._row, self._restated = context.row, context.turns
    said = [m["content"] for m in context.messages if is_instruction(m)]
    if not said:
      return []
    text = said[-1] if len(said[-1]) <= _MAX_OBJECTIVE else f"{said[-1][:_MAX_OBJECTIVE]} [...]"
    left = _items(self._todo(), _OPEN)
    open_items = "".join(f"\n- {item}" for item in left[:_MAX_OPEN])
    more = f"\nOpen items of the todo list ({len(left)}):{open_items}" if left else ""
    return [f"The objective is still:\n{text}{more}"]


def _items(text: str, marks: Sequence[str]) -> list[str]:
  """What stands behind one of some marks, line by line."""
  found = []
  for mark in marks:
    lines = (line.partition(mark) for line in text.splitlines())
    found += [item.strip() for before, there, item in lines if there and len(before.strip()) <= 1]
  return found
