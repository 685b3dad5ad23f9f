"""What the loop asks of a model and what it gets: the one place where requests take shape.

A request is a body of the OpenAI chat API, whoever answers it: a server, a script, or the engine of
a training run. `wire` is its bytes; the same conversation gives the same bytes in training and in
deployment (`rome.agent.openai_model` sends exactly these).

Ids of calls are the loop's own ("call_TURN_INDEX"), as servers draw them at random.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Message = dict[str, Any]  # of the OpenAI chat API: role, content, tool_calls, tool_call_id
# What servers call thinking that is not in the content: vLLM (from 0.11 on) the first, DeepSeek,
# SGLang and older vLLM the second. Where both come the first counts, as new vLLM reads it alone.
REASONING = ("reasoning", "reasoning_content")


@dataclasses.dataclass(frozen=True)
class Call:
  """A tool call of a reply; `arguments` is JSON as the model wrote it."""

  id: str
  name: str
  arguments: str


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """What every request of a conversation says beside its messages.

  Attributes:
    model: name of the model.
    max_tokens: tokens a reply may have.
    temperature, top_p: of sampling, None for the endpoint's own.
  """

  model: str
  max_tokens: int
  temperature: float | None = None
  top_p: float | None = None


@dataclasses.dataclass(frozen=True)
class ModelRequest:
  """One LLM call.

  Attributes:
    messages: the whole context.
    tools: schemas of the tools that may be called.
    settings: the rest of the body.
    ids: the context as token ids, where the loop knows the policy's tokenizer, else ().
    purpose: "turn", or what else asks ("summary", a sub-agent's name); it is not sent.
  """

  messages: Sequence[Message]
  tools: Sequence[Mapping[str, Any]]
  settings: ModelSettings
  ids: Sequence[int] = ()
  purpose: str = "turn"

  def body(self) -> dict[str, Any]:
    """The body of a chat completion."""
    s = self.settings
    found: dict[str, Any] = {"model": s.model, "messages": list(self.messages)}
    if self.tools:
      found["tools"] = list(self.tools)
    found["max_tokens"] = s.max_tokens
    for name in ("temperature", "top_p"):
      if (value := getattr(s, name)) is not None:
        found[name] = value
    return found

  def wire(self) -> bytes:
    """The body as the bytes that are sent."""
    text = json.dumps(self.body(), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", errors="replace")


@dataclasses.dataclass(frozen=True)
class ModelReply:
  """The answer to one LLM call.

  Attributes:
    content: what the model said beside its calls, thinking included.
    reasoning: thinking beside the content, by the one name of `REASONING` under which it came; it
      goes back under the same, as DeepSeek wants and as templates of Qwen read it. {} for none.
    calls: its tool calls.
    finish: "stop", "length" (cut off) or "tool_calls".
    prompt_tokens, completion_tokens: as the endpoint counts; 0 where it does not say.
    ids: the sampled ids where they are known, else ().
  """

  content: str
  calls: tuple[Call, ...] = ()
  finish: str = "stop"
  prompt_tokens: int = 0
  completion_tokens: int = 0
  ids: tuple[int, ...] = ()
  reasoning: Mapping[str, str] = dataclasses.field(default_factory=dict)


class ModelError(RuntimeError):
  """The model cannot be asked: the endpoint is not there, refuses, or answers nonsense."""


class Model(Protocol):
  """Answers requests; a caller may have several under way in threads."""

  def complete(self, request: ModelRequest) -> ModelReply:
    """The reply.

    Raises:
      ModelError: there is none; the message says why.
    """
