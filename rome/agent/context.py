"""The context of one conversation: messages, their token ids, and what may be done to them.

It grows by appending: a reply, results of tools, reminders. What was rendered once stays as it is,
thinking included, so that every request's ids begin with those of the one before. The only way to
change what is there is `rewrite`, which begins a new row for training.

Where the policy's tokenizer is known, `ids` are exactly what the policy reads, and counts are
exact. A reply of an endpoint comes as text: its ids are spelled anew from that, and the count is
the endpoint's, and by the tokenizer for what came since. So a context reaches its limit at the same
message in training and in deployment. Where the tokenizer is not known (an endpoint of somebody
else's), counts are those that the endpoint reports, plus an estimate of what came since, by the
characters that a token had so far.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rome.agent.model import Call, Message, ModelReply, ModelRequest, ModelSettings
from rome.text.render import Renderer

CHARACTERS_A_TOKEN = 4.0  # until an endpoint has reported


class Context:
  """One conversation.

  Args:
    settings: of its requests.
    tools: schemas of its tools.
    limit: tokens that a request and its reply may have together.
    renderer: of the policy's tokenizer, None where it is not known.
  Attributes:
    messages: the conversation so far; not to be changed from outside.
    ids: its token ids up to where the next reply begins; () without a renderer.
    row: how often it was rewritten.
    turns: replies so far.
  """

  def __init__(
    self,
    settings: ModelSettings,
    tools: Sequence[Mapping[str, Any]],
    limit: int,
    renderer: Renderer | None = None,
  ):
    self.settings, self.tools, self.limit, self.renderer = settings, tools, limit, renderer
    self.messages: list[Message] = []
    self.ids: list[int] = []
    self.row = 0
    self.turns = 0
    self._answered = False  # whether a reply is the last message
    self._asked = False  # whether a request has been made of what is there
    self._last: int | None = None  # the last id of the last reply
    self._mark = (0, 0)  # messages and ids up to the end of the last reply
    self._beyond = 0  # tokens that the endpoint counted more than `ids` has up to the last reply
    self._reported = 0  # tokens, as the endpoint counted them, of messages before `_since`
    self._since = 0
    self._characters = CHARACTERS_A_TOKEN

  def begin(self, messages: Sequence[Message]) -> None:
    """The first messages, system and user."""
    self.messages, self._answered, self._asked, self._mark = list(messages), False, False, (0, 0)
    self._beyond = 0
    if self.renderer:
      self.ids = self.renderer.prompt(self.messages, self.tools)

  def reply(self, reply: ModelReply) -> list[Call]:
    """Takes the reply to `request`; its calls get the ids that the conversation has from now on."""
    calls = [
      Call(f"call_{self.turns}_{i}", call.name, call.arguments)
      for i, call in enumerate(reply.calls)
    ]
    message: Message = {"role": "assistant", "content": reply.content, **reply.reasoning}
    if calls:
      message["tool_calls"] = [
        {
          "id": call.id,
          "type": "function",
          "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
      ]
    self.messages.append(message)
    if self.renderer:
      ids = reply.ids or self.renderer.spell(message, self.tools)
      if not reply.ids and reply.finish == "length":
        ids = ids[:-1]  # it has no end; `append` closes it
      self.ids += ids
      self._last = ids[-1] if ids else None
    self._answered, self._mark = True, (len(self.messages), len(self.ids))
    if reply.prompt_tokens:
      self._reported = reply.prompt_tokens + reply.completion_tokens
      self._since = len(self.messages)
      if self.renderer:
        self._beyond = self._reported - len(self.ids)
      else:
        size = _size(self.messages) + _size(self.tools)
        self._characters = min(max(size / self._reported, 1.0), 6.0)
    self.turns += 1
    return calls

  def append(self, messages: Sequence[Message]) -> None:
    """What comes after a reply: results, then reminders or words of the user.

    More may be appended until the next request; what came since the reply is then rendered again.

    Raises:
      ValueError: a request of this context was made, and no reply to it came; wait, or rewrite it.
    """
    if self._asked and not self._answered:
      raise ValueError("a context is appended to behind a reply; rewrite it, or wait for one")
    self.messages += messages
    known, ids = self._mark
    if self.renderer:
      new = self.messages[known:]
      self.ids[ids:] = (
        self.renderer.extend(new, self.tools, self._last)
        if known
        else self.renderer.prompt(new, self.tools)
      )
    self._answered = self._asked = False

  def rewrite(self, messages: Sequence[Message]) -> None:
    """Puts another conversation in the place of this one: an explicit edit."""
    self.row += 1
    self._reported, self._since = 0, 0
    self.begin(messages)

  def request(self, purpose: str = "turn") -> ModelRequest:
    """What to ask the model now."""
    self._asked = True
    return ModelRequest(
      tuple(self.messages), self.tools, self.settings, tuple(self.ids), purpose=purpose
    )

  def tokens(self) -> int:
    """Tokens of the context: exact with a renderer."""
    if self.renderer:
      return len(self.ids) + self._beyond
    new = self.messages[self._since :]
    size = (_size(new) if new else 0) + (0 if self._since else _size(self.tools))
    return self._reported + math.ceil(size / self._characters)

  def measure(self, messages: Sequence[Message]) -> int:
    """Tokens that a context of these messages alone would have, counted as `tokens` counts."""
    if self.renderer:
      return len(self.renderer.prompt(messages, self.tools))
    return math.ceil((_size(messages) + _size(self.tools)) / self._characters)

  def count(self, text: str) -> int:
    """Tokens of a text."""
    if self.renderer:
      return len(self.renderer.tokenizer.encode(text))
    return math.ceil(len(text) / self._characters)

  def room(self) -> int:
    """Tokens that are left beside the context and a reply; below 0 the next request is too long."""
    return self.limit - self.settings.max_tokens - self.tokens()


def _size(value: Sequence[Any]) -> int:
  return len(json.dumps(value, ensure_ascii=False))
