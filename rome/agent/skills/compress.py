"""Keeps a context below its limit: first without loss, then by a summary that the policy writes.

The summary is asked for behind the conversation as it stands, so its request begins with the ids of
the one before and its reply is one more chunk of the same row, trained like any other. Then the
context is rewritten, once:

    system, instructions, [summary, todo], the last turns word by word

A turn is a reply with all that came until the next one, so no call loses its result. Instructions
are the user's messages that are no reminders. Where the policy writes no summary, or there is no
room to ask for one, the older turns go without, and a note says so. A context that even then would
be too long is left as it is, and the loop ends with "context_full".
"""

import re
from collections.abc import Callable, Generator, Sequence

from rome.agent.context import Context
from rome.agent.loop import Skill, Steps, reminder
from rome.agent.model import Message, ModelReply, ModelRequest
from rome.agent.skills.lossless import Lossless, ends, shortened
from rome.agent.workspace import Workspace

AT = 0.8  # of the limit
ASK = (
  "The context is nearly full and older turns are about to be removed. Write down, in plain text"
  " and without calling tools, all that you need to finish the task: what you found, what is done,"
  " what is left."
)
LOST = "Older turns were removed from the context; there is no summary of them."
_GONE = "Older turns were removed from the context. Your summary of them:"
_SHARE = 0.25  # of the goal that a summary, or the todo list, may fill
_LAST = (2000, 1000, 500, 250, 100)  # characters of a result where one turn alone is too long
_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_OPEN, _CLOSE = reminder("").split()

Archive = Callable[[Sequence[Message]], None]  # takes what leaves a context


class Compress(Skill):
  """See the module.

  Args:
    at: share of the limit at which it acts.
    goal: share of the limit that the rewritten context may have.
    turns: last turns that stay word by word, fewer where they are long.
    summary: whether the policy is asked for a summary.
    lossless: tried first, None to go straight on.
    todo: the todo list as text, "" for none.
    archive: is given the messages that leave the context.
  """

  def __init__(
    self,
    at: float = AT,
    goal: float = AT / 2,
    turns: int = 4,
    summary: bool = True,
    lossless: Lossless | None = None,
    todo: Callable[[], str] = lambda: "",
    archive: Archive = lambda messages: None,
  ):
    if not 0 < goal < at <= 1:
      raise ValueError(f"Compress: 0 < goal < at <= 1, got goal={goal:g} and at={at:g}")
    if turns < 0:
      raise ValueError(f"Compress: turns must be at least 0, got {turns}")
    self._at, self._goal, self._turns, self._summary = at, goal, turns, summary
    self._lossless, self._todo, self._archive = lossless, todo, archive
    self._said = ""  # the last summary

  def before(self, context: Context) -> Steps:
    if context.tokens() >= self._at * context.limit or context.room() < 0:
      yield from self.compress(context)

  def compress(self, context: Context) -> Steps:
    """Rewrites the context now, where that makes it shorter."""
    old, most = list(context.messages), self._at * context.limit
    edited = self._lossless.edit(old) if self._lossless else old
    size = context.measure(edited) if edited != old else context.tokens()
    fixed = context.measure(least := [*_split(edited, 0)[0], _note(LOST)])
    # Where what stays is long already, half of what is left above it.
    goal = int(max(self._goal * context.limit, (fixed + most) / 2))
    enough = edited != old and size <= goal
    if not enough and len(least) <= len(edited) and fixed < min(most, size):
      if self._summary:
        self._said = (yield from self._ask(context, edited)) or self._said
      edited = self._rebuilt(context, edited, goal)
    elif edited == old or size >= most:
      return
    kept = set(map(id, edited))
    self._archive([message for message in old if id(message) not in kept])
    context.rewrite(edited)

  def _ask(
    self, context: Context, edited: Sequence[Message]
  ) -> Generator[ModelRequest, ModelReply, str]:
    """A summary by the policy, "" for none."""
    ask: Message = {"role": "user", "content": reminder(ASK)}
    context.append([ask])
    if context.room() < 0:
      context.rewrite([*shortened(edited, _LAST[-1], self._workspace), ask])
      if context.room() < 0:
        return ""
    reply = yield context.request("summary")
    return _THOUGHT.sub("", reply.content).strip()

  def _rebuilt(self, context: Context, messages: Sequence[Message], goal: int) -> list[Message]:
    """The conversation without its older turns, as many of the last as `goal` tokens hold."""
    note = _note(self._words(context, int(_SHARE * self._goal * context.limit)))
    for turns in range(self._turns, 0, -1):
      head, tail = _split(messages, turns)
      if context.measure(found := [*head, note, *tail]) <= goal:
        return found
    head, tail = _split(messages, 1)
    for limit in _LAST if self._turns else ():
      found = [*head, note, *shortened(tail, limit, self._workspace)]
      if context.measure(found) <= goal:
        return found
    head, _ = _split(messages, 0)
    for found in ([*head, note], [*head, _note(LOST)]):
      if context.measure(found) < self._at * context.limit:
        break
    return found

  def _words(self, context: Context, limit: int) -> str:
    """Summary and todo list, each within so many tokens."""
    parts = [f"{_GONE}\n{_fit(context, self._said, limit)}" if self._said else LOST]
    if todo := self._todo().strip():
      parts.append(f"The todo list:\n{_fit(context, todo, limit)}")
    return "\n\n".join(parts)

  @property
  def _workspace(self) -> Workspace | None:
    return self._lossless.workspace if self._lossless else None


def _split(messages: Sequence[Message], turns: int) -> tuple[list[Message], list[Message]]:
  """System and instructions of all but the last turns, and those turns."""
  starts = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
  edge = [0, *starts, len(messages)][max(len(starts) + 1 - turns, 0)]
  edge = max(edge, starts[0] if starts else len(messages))
  first = next((m for m in messages if m["role"] == "user"), None)  # whatever it says
  head = [m for m in messages[:edge] if m["role"] == "system" or m is first or is_instruction(m)]
  return head, list(messages[edge:])


def is_instruction(message: Message) -> bool:
  """Whether a message has words of the user, and not only of the system."""
  text = message["content"]
  return message["role"] == "user" and not (text.startswith(_OPEN) and text.endswith(_CLOSE))


def _note(text: str) -> Message:
  return {"role": "user", "content": reminder(text)}


def _fit(context: Context, text: str, tokens: int) -> str:
  """The text, or its ends where it has more tokens."""
  size = len(text)
  found = text
  while size > 16 and context.count(found) > tokens:
    size = size * 2 // 3
    found = ends(text, size, "")
  return found
