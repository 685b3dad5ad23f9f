"""The context of one conversation: messages, their token ids, and what may be done to them.

It grows by appending: a reply, results of tools, reminders. What was rendered once stays as it is,
thinking included, so that every request's ids begin with those of the one before. The only way to
change what is there is `rewrite`, which begins a new row for training.

Where the policy's tokenizer is known, `ids` are exactly what the policy reads, and counts are
exact. Where it is not (an endpoint of somebody else's), counts are those that the endpoint reports,
plus an estimate of what came since (`CHARACTERS_A_TOKEN`).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rome.agent.model import Call, Message, ModelReply, ModelRequest, ModelSettings
from rome.text.render import Renderer

CHARACTERS_A_TOKEN = 4


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
    self._last: int | None = None  # its last id
    self._reported = 0  # tokens, as the endpoint counted them, of messages before `_since`
    self._since = 0

  def begin(self, messages: Sequence[Message]) -> None:
    """The first messages, system and user."""
    self.messages, self._answered = list(messages), False
    if self.renderer:
      self.ids = self.renderer.prompt(self.messages, self.tools)

  def reply(self, reply: ModelReply) -> list[Call]:
    """Takes the reply to `request`; its calls get the ids that the conversation has from now on."""
    calls = [
      Call(f"call_{self.turns}_{i}", call.name, call.arguments)
      for i, call in enumerate(reply.calls)
    ]
    message: Message = {"role": "assistant", "content": reply.content}
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
      self.ids += ids
      self._last = ids[-1] if ids else None
    self._answered = True
    if reply.prompt_tokens:
      self._reported = reply.prompt_tokens + reply.completion_tokens
      self._since = len(self.messages)
    self.turns += 1
    return calls

  def append(self, messages: Sequence[Message]) -> None:
    """What comes after a reply, all of it: results, then reminders or words of the user.

    Raises:
      ValueError: the last message is no reply; the context ends where the next one begins.
    """
    if not self._answered:
      raise ValueError("a context is appended to behind a reply; rewrite it, or wait for one")
    self.messages += messages
    if self.renderer:
      self.ids += self.renderer.extend(messages, self.tools, self._last)
    self._answered = False

  def rewrite(self, messages: Sequence[Message]) -> None:
    """Puts another conversation in the place of this one: an explicit edit."""
    self.row += 1
    self._reported, self._since = 0, 0
    self.begin(messages)

  def request(self, purpose: str = "turn") -> ModelRequest:
    """What to ask the model now."""
    return ModelRequest(
      tuple(self.messages), self.tools, self.settings, tuple(self.ids), purpose=purpose
    )

  def tokens(self) -> int:
    """Tokens of the context: exact with a renderer."""
    if self.renderer:
      return len(self.ids)
    new = self.messages[self._since :]
    size = len(json.dumps(new, ensure_ascii=False)) if new else 0
    if not self._since:
      size += len(json.dumps(self.tools, ensure_ascii=False))
    return self._reported + -(-size // CHARACTERS_A_TOKEN)

  def room(self) -> int:
    """Tokens that are left beside the context and a reply; below 0 the next request is too long."""
    return self.limit - self.settings.max_tokens - self.tokens()
