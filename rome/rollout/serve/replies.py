"""Updates of the engine as choices of the API, in pieces and whole.

A whole reply is one piece. So a stream's pieces, put together, are what the same request gives
without a stream.
"""

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from rome.rollout.engine import Reply, Update
from rome.rollout.serve.plan import Plan
from rome.rollout.serve.vocabulary import Offsets, Vocabulary
from rome.text.tool_calls import Call, CallParser, parser_for


@dataclasses.dataclass(frozen=True)
class _Piece:
  text: str
  calls: list[Call]
  first_call: int  # number of the first of them in the reply
  logprobs: dict[str, Any] | None
  finish: str | None


class Choice:
  """One choice of an answer."""

  def __init__(self, index: int, plan: Plan, vocabulary: Vocabulary):
    self.index = index
    self._plan, self._vocabulary = plan, vocabulary
    self._parser: CallParser | None = None
    if plan.tools:
      self._parser = parser_for(vocabulary.tokenizer, plan.tools)
    self._offsets = Offsets(vocabulary)
    self._begun = False

  def chunk(self, update: Update) -> dict[str, Any] | None:
    """An update as a choice of a chunk; None where it says nothing."""
    piece = self._piece(update)
    plan, begun = self._plan, self._begun
    silent = not (piece.text or piece.calls or piece.finish)
    if silent and not (update.tokens and (plan.token_ids or plan.logprobs is not None)):
      return None
    choice: dict[str, Any] = {"index": self.index}
    if plan.chat:
      delta: dict[str, Any] = {"content": piece.text} if piece.text or not piece.finish else {}
      if piece.calls:
        numbered = enumerate(piece.calls, piece.first_call)
        delta["tool_calls"] = [{"index": i, **call.message()} for i, call in numbered]
        if not piece.text:
          delta.pop("content", None)
      choice["delta"] = delta
    else:
      choice["text"] = piece.text
    choice |= {"logprobs": piece.logprobs, "finish_reason": piece.finish}
    self._begun = True
    return choice | self._extras(update, first=not begun)

  def opening(self) -> dict[str, Any]:
    """The choice of a chat's first chunk, which names the role."""
    delta = {"role": "assistant", "content": ""}
    return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

  def whole(self, reply: Reply) -> dict[str, Any]:
    """A reply as a choice of an answer."""
    update = Update(reply.id, reply.tokens, reply.logps, reply.top, reply.text, reply)
    piece = self._piece(update)
    choice: dict[str, Any] = {"index": self.index}
    if self._plan.chat:
      content = None if piece.calls and not piece.text else piece.text
      message: dict[str, Any] = {"role": "assistant", "content": content}
      if piece.calls:
        message["tool_calls"] = [call.message() for call in piece.calls]
      choice["message"] = message
    else:
      choice["text"] = piece.text
    choice |= {"logprobs": piece.logprobs, "finish_reason": piece.finish}
    return choice | self._extras(update, first=True)

  def _piece(self, update: Update) -> _Piece:
    finish = update.reply.finish if update.reply else None
    text, first = update.text, 0
    calls: list[Call] = []
    if self._parser:
      first = self._parser.count
      text, calls = self._parser.push(update.text, last=finish is not None)
      if finish == "stop" and self._parser.count:
        finish = "tool_calls"
    return _Piece(text, calls, first, self._logprobs(update), finish)

  def _logprobs(self, update: Update) -> dict[str, Any] | None:
    count = self._plan.logprobs
    if count is None:
      return None
    tokens, logps, top = update.tokens, update.logps, update.top
    if self._plan.chat:
      return {"content": self._vocabulary.chat_logprobs(tokens, logps, top, count), "refusal": None}
    return {
      "tokens": [self._vocabulary.name(t) for t in tokens],
      "token_logprobs": logps,
      "top_logprobs": [self._vocabulary.alternatives(t, count) for t in top] if count else None,
      "text_offset": [self._offsets.next(t) for t in tokens],
    }

  def _extras(self, update: Update, first: bool) -> dict[str, Any]:
    """What `return_token_ids` asks for."""
    if not self._plan.token_ids:
      return {}
    found: dict[str, Any] = {"token_ids": update.tokens, "token_logprobs": update.logps}
    if first and not self._plan.chat:
      found["prompt_token_ids"] = self._plan.prompts[self.index // self._plan.n]
    if update.reply:
      found["weight_version"] = update.reply.version
    return found


def usage(plan: Plan, replies: Sequence[Reply]) -> dict[str, Any]:
  """Exact counts. Of a prompt's choices the one counts that found least in the cache: the first."""
  prompt = sum(map(len, plan.prompts))
  sampled = sum(len(reply.tokens) for reply in replies)
  groups = [replies[i : i + plan.n] for i in range(0, len(replies), plan.n)]
  return {
    "prompt_tokens": prompt,
    "completion_tokens": sampled,
    "total_tokens": prompt + sampled,
    "prompt_tokens_details": {"cached_tokens": sum(min(r.cached for r in g) for g in groups)},
  }


def head(plan: Plan, model: str, version: int, stream: bool) -> dict[str, Any]:
  """What every answer, and every chunk of one, begins with."""
  kind = ("chat.completion.chunk" if stream else "chat.completion") if plan.chat else None
  found: dict[str, Any] = {
    "id": f"{'chatcmpl' if plan.chat else 'cmpl'}-{uuid.uuid4().hex}",
    "object": kind or "text_completion",
    "created": int(time.time()),
    "model": model,
    "system_fingerprint": f"rome-v{version}",
  }
  if plan.chat and plan.token_ids:
    found["prompt_token_ids"] = plan.prompts[0]
  return found
