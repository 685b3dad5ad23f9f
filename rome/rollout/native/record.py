"""The calls of one episode of a foreign agent, as rows of token ids.

A foreign agent sends its whole conversation with every call. A call whose messages go on from an
earlier call and its reply is not rendered again: its context is that call's context, the ids that
were sampled, and the ids of the new messages alone. So no token is made twice, whatever a template
would make of a reply once it is history. The earlier call with the longest conversation wins, which
keeps sub-agents and side calls (a title, a summary) apart that share one key. A call that goes on
from none is rendered whole: the agent began something new, or rewrote its context.

Messages are compared by what they say: role, text, calls (name and arguments) and the reasoning
where the agent kept it. So a reply may come back with content null or "", with its arguments as
another text of the same JSON, with or without its reasoning.

A row is a run of calls each of which goes on from the one before it. Any other call begins a new
row with its whole context, which holds earlier replies as tokens of no call: each chunk is trained
on once. So rows, like chunks, are in the order in which calls were made (`rome.trajectory`), at the
price of some context twice where conversations take turns.
"""

import dataclasses
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rome.agent import Agent
from rome.rollout.engine import Reply
from rome.rollout.recorder import Episode, Recorder
from rome.text.render import Renderer
from rome.trajectory import Reward, Trajectory, Turn

Message = dict[str, Any]
LONGEST_VIEW = 4000  # characters of an observation in the text view


class Said(NamedTuple):
  """What a message says, in the one form in which messages are compared."""

  role: str
  text: str
  calls: tuple[tuple[str, str], ...]  # name, arguments
  reasoning: str
  rest: str  # what else there is, as JSON

  def came_back(self, given: "Said") -> bool:
    """Whether `given` is this message, as an agent may send it again."""
    return given == self or given == self._replace(reasoning="")


def said(message: Mapping[str, Any]) -> Said:
  """What a message of the OpenAI API says; its content is text, or None."""
  own = ("role", "content", "tool_calls", "reasoning_content")
  calls = tuple(
    (call["function"]["name"], _canonical(_arguments(call["function"]["arguments"])))
    for call in message.get("tool_calls") or ()
  )
  return Said(
    message["role"],
    message.get("content") or "",
    calls,
    message.get("reasoning_content") or "",
    _canonical({name: message[name] for name in message if name not in own}),
  )


def _arguments(arguments: Any) -> Any:
  return json.loads(arguments or "{}") if isinstance(arguments, str) else arguments


def _canonical(value: Any) -> str:
  return json.dumps(value, sort_keys=True, ensure_ascii=False)


@dataclasses.dataclass
class Call:
  """One LLM call.

  Attributes:
    number: its place in the episode, from 0; also the number of its chunk.
    tools: schemas of its tools.
    context: the ids that the policy saw.
    parent: number of the call that it goes on from; None where it was rendered whole.
    history: what its messages say, and behind them its reply, once it is there.
    new: messages that came behind the parent's reply.
    reply: None until it is there.
    message: the reply as it was sent.
  """

  number: int
  tools: Sequence[Message]
  context: list[int]
  parent: int | None
  history: list[Said]
  new: Sequence[Message]
  reply: Reply | None = None
  message: Message | None = None

  @property
  def begins_row(self) -> bool:
    """Whether it does not go on from the call before it."""
    return self.number == 0 or self.parent != self.number - 1


class Record(Recorder):
  """The calls of one episode. `begin` and `answer` are for one thread.

  Args:
    renderer: makes ids of messages, and messages of ids.
    stop_tokens: ids that end a reply and are no part of its text.
  Attributes:
    log: the calls, in the order in which they were made.
  """

  def __init__(self, renderer: Renderer, stop_tokens: Sequence[int] = ()):
    super().__init__()
    self._renderer, self._stop_tokens = renderer, tuple(stop_tokens)
    self._lock = threading.Lock()
    self.log: list[Call] = []

  @property
  def rows(self) -> int:
    """Rows so far."""
    return sum(call.begins_row for call in self.log)

  @property
  def calls(self) -> int:
    """Calls so far, those without a reply too."""
    return len(self.log)

  def read(self, messages: Sequence[Message], tools: Sequence[Message]) -> Call:
    """The call that these messages make, not yet part of the record.

    Args:
      messages: the conversation, in the form of the OpenAI API, contents as text.
      tools: schemas of the tools, likewise.
    Raises:
      ValueError: the template refuses them.
    """
    history = [said(m) for m in messages]
    parent = self._parent(history, tools)
    if parent is not None:
      assert parent.reply is not None
      before = [*parent.context, *parent.reply.tokens]
      new = messages[len(parent.history) :]
      try:
        ids = self._renderer.extend(new, tools, before[-1])
      except ValueError:  # a template may refuse the one and take the other
        pass
      else:
        return Call(len(self.log), tools, [*before, *ids], parent.number, history, new)
    ids = self._renderer.prompt(messages, tools)
    return Call(len(self.log), tools, ids, None, history, messages)

  def _parent(self, history: list[Said], tools: Sequence[Message]) -> Call | None:
    """The answered call with the longest conversation that `history` goes on from."""
    found = None
    for call in self.log:
      size = len(call.history)
      if call.reply is None or size >= len(history) or call.tools != tools:
        continue
      if found is not None and size <= len(found.history):
        continue
      if call.history[-1].came_back(history[size - 1]) and all(
        old.came_back(new) for old, new in zip(call.history, history, strict=False)
      ):
        found = call
    return found

  def begin(self, call: Call) -> None:
    """Takes a call that was just read into the record."""
    assert call.number == len(self.log)
    with self._lock:
      self.log.append(call)

  def answer(self, call: Call, reply: Reply) -> Message:
    """Takes the reply to a call.

    Returns:
      The message to send. Ids of tool calls follow from the call's number, so that an episode that
      is played again is the same.
    """
    message = self._renderer.parse(reply.tokens, call.tools, self._stop_tokens)
    for i, made in enumerate(message.get("tool_calls", ())):
      made["id"] = f"call_{call.number}_{i}"
    with self._lock:
      call.history.append(said(message))
      call.reply, call.message = reply, message
    return message

  def finish(
    self, episode: Episode, agent: Agent | None, reward: Reward, reason: str
  ) -> Trajectory:
    """The trajectory of the calls that were answered.

    Calls behind one that was not are left out: the number of a call keys its randomness.
    """
    with self._lock:
      answered = next((i for i, c in enumerate(self.log) if c.reply is None), len(self.log))
      log = self.log[:answered]
    replies = [call.reply for call in log if call.reply is not None]
    tokens, call_ids, logps, starts = _rows(log)
    return Trajectory(
      id=episode.id,
      task_id=episode.task.id,
      family=episode.task.family,
      instruction=agent.instruction if agent else "",
      tokens=np.array(tokens, np.int32),
      call_ids=np.array(call_ids, np.int32),
      logps=np.array(logps, np.float32),
      versions=np.array([reply.version for reply in replies], np.int32),
      chunk_rewards=np.zeros(len(log), np.float32),
      reward=reward,
      end_reason=reason,
      turns=tuple(self._turn(call, log) for call in log),
      row_starts=tuple(starts),
    )

  def _turn(self, call: Call, log: Sequence[Call]) -> Turn:
    """The text view of a call: its reply, and what the agent said to it."""
    assert call.reply is not None
    action = self._renderer.tokenizer.decode(call.reply.tokens)
    for later in log[call.number + 1 :]:
      if later.parent == call.number:
        text = "\n".join(message.get("content") or "" for message in later.new)
        return Turn(action, text[:LONGEST_VIEW], None)
    return Turn(action, "", None)


def _rows(log: Sequence[Call]) -> tuple[list[int], list[int], list[float], list[int]]:
  """Tokens, call ids, log-probs and starts of rows; see the module."""
  tokens: list[int] = []
  call_ids: list[int] = []
  logps: list[float] = []
  starts: list[int] = []
  for call in log:
    assert call.reply is not None
    if call.begins_row:
      starts.append(len(tokens))
    new = call.context[len(tokens) - starts[-1] :]
    tokens += [*new, *call.reply.tokens]
    call_ids += [-1] * len(new) + [call.number] * len(call.reply.tokens)
    logps += [0.0] * len(new) + call.reply.logps
  return tokens, call_ids, logps, starts or [0]
