"""The JSON that comes in, typed.

Unknown fields are refused, and so is every field of the OpenAI API that would be ignored: `NEUTRAL`
lists those with the values that ask for nothing.

Extensions, named as in vLLM: `top_k`, `min_p`, `stop_token_ids`, `ignore_eos`, `return_token_ids`,
`chat_template_kwargs`; and `prompt_token_ids` of a chat, which takes the place of its messages.
"""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Discriminator, Field, Tag

from rome.rollout.engine.request import MAX_BIAS, MAX_TOP
from rome.rollout.serve.errors import ApiError

MAX_CHOICES = 128  # replies that one request may ask for, over all its prompts
MAX_STOPS = 4

# Fields of the API that are not supported -> the values that mean the same as leaving them out.
NEUTRAL: dict[str, tuple[Any, ...]] = {
  "audio": (),
  "best_of": (1,),
  "echo": (False,),
  "frequency_penalty": (0,),
  "function_call": (),
  "functions": (),
  "metadata": ({},),
  "modalities": (["text"],),
  "moderation": (),
  "parallel_tool_calls": (True,),
  "prediction": (),
  "presence_penalty": (0,),
  "prompt_cache_key": (),
  "prompt_cache_options": (),
  "prompt_cache_retention": (),
  "reasoning_effort": (),
  "response_format": ({"type": "text"},),
  "safety_identifier": (),
  "service_tier": ("auto", "default"),
  "store": (False,),
  "suffix": (),
  "verbosity": (),
  "web_search_options": (),
}


class _In(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(
    extra="forbid", allow_inf_nan=False, strict=True, hide_input_in_errors=True
  )


def _kind_of_text(value: Any) -> str:
  return "text" if isinstance(value, str) else "parts"


def _kind_of_prompt(value: Any) -> str:
  if not isinstance(value, list):
    return "text"
  first = value[0] if value else ""
  if isinstance(first, list):
    return "prompts"
  return "texts" if isinstance(first, str) else "ids"


class TextPart(_In):
  """A part of a message's content; other parts than text are not supported."""

  type: Literal["text"]
  text: str


Content = Annotated[
  Annotated[str, Tag("text")]
  | Annotated[list[TextPart], Tag("parts"), Field(min_length=1, fail_fast=True)],
  Discriminator(_kind_of_text),
]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
  Annotated[str, Tag("text")]
  | Annotated[list[str], Tag("texts"), Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
  | Annotated[TokenIds, Tag("ids")]
  | Annotated[
    list[TokenIds], Tag("prompts"), Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)
  ],
  Discriminator(_kind_of_prompt),
]
Stop = Annotated[
  Annotated[str, Tag("text"), Field(min_length=1)]
  | Annotated[list[Annotated[str, Field(min_length=1)]], Tag("parts"), Field(max_length=MAX_STOPS)],
  Discriminator(_kind_of_text),
]


class FunctionIn(_In):
  """A call that an assistant made: the arguments are a JSON object, as text."""

  name: str = Field(min_length=1)
  arguments: str


class ToolCallIn(_In):
  """One of an assistant's `tool_calls`."""

  id: str | None = None
  type: Literal["function"] = "function"
  function: FunctionIn


class SystemMessage(_In):
  """What the developer says; "developer" is another name for "system"."""

  role: Literal["system", "developer"]
  content: Content
  name: str | None = None


class UserMessage(_In):
  """What the user says."""

  role: Literal["user"]
  content: Content
  name: str | None = None


class AssistantMessage(_In):
  """What the model said before; what the API puts beside it in an answer may come back empty."""

  role: Literal["assistant"]
  content: Content | None = None
  name: str | None = None
  tool_calls: list[ToolCallIn] | None = None
  reasoning_content: str | None = None
  refusal: None = None
  audio: None = None
  function_call: None = None
  annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(_In):
  """What a tool gave back."""

  role: Literal["tool"]
  content: Content
  tool_call_id: str | None = None
  name: str | None = None


Message = Annotated[
  SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class FunctionTool(_In):
  """What a tool is called and takes; `parameters` is a JSON schema."""

  name: str = Field(min_length=1, max_length=256)
  description: str | None = None
  parameters: dict[str, Any] | None = None
  strict: Literal[False] | None = Field(default=None, description="true is not supported")


class ToolIn(_In):
  """One of the tools that the model may call."""

  type: Literal["function"]
  function: FunctionTool


class StreamOptions(_In):
  """What a stream carries beside the reply."""

  include_usage: bool | None = None
  include_obfuscation: Literal[False] | None = None


class _Common(_In):
  """What both kinds of request have."""

  model: str
  max_tokens: int | None = Field(default=None, ge=1, description="by default what fits")
  temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy")
  top_p: float | None = Field(default=None, gt=0, le=1)
  top_k: int | None = Field(default=None, ge=-1, description="0 and -1 keep every token")
  min_p: float | None = Field(default=None, ge=0, le=1)
  n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
  seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 64)
  stop: Stop | None = None
  stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
  ignore_eos: bool = False
  logit_bias: (
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]
    | None
  ) = Field(default=None, max_length=MAX_BIAS)
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  user: str | None = Field(default=None, max_length=512)
  return_token_ids: bool = False

  @pydantic.model_validator(mode="before")
  @classmethod
  def _supported(cls, data: Any) -> Any:
    if not isinstance(data, dict):
      return data
    for name in NEUTRAL.keys() & data.keys() - cls.model_fields.keys():
      if data[name] is not None and data[name] not in NEUTRAL[name]:
        raise ApiError(
          400, f"{name} is not supported: leave it out", param=name, code="unsupported_parameter"
        )
    return {k: v for k, v in data.items() if k not in NEUTRAL or k in cls.model_fields}

  @pydantic.model_validator(mode="after")
  def _whole(self) -> "_Common":
    if self.stream_options is not None and not self.stream:
      raise ApiError(400, "stream_options is only for stream=true", param="stream_options")
    return self


class ChatIn(_Common):
  """The body of /v1/chat/completions: `messages`, or `prompt_token_ids` in their place."""

  messages: list[Message] | None = Field(default=None, min_length=1)
  prompt_token_ids: TokenIds | None = None
  max_completion_tokens: int | None = Field(default=None, ge=1)
  logprobs: bool | None = None
  top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP)
  tools: list[ToolIn] | None = Field(default=None, max_length=128)
  tool_choice: Any = Field(default=None, description='"auto" (the default) or "none"')
  chat_template_kwargs: dict[str, Any] | None = None

  @pydantic.model_validator(mode="after")
  def _one_of_each(self) -> "ChatIn":
    if (self.messages is None) == (self.prompt_token_ids is None):
      raise ApiError(400, "give either messages or prompt_token_ids", param="messages")
    if self.prompt_token_ids is not None and self.chat_template_kwargs:
      raise ApiError(400, "prompt_token_ids pass no template", param="chat_template_kwargs")
    limits = {self.max_tokens, self.max_completion_tokens} - {None}
    if len(limits) > 1:
      raise ApiError(
        400, "max_tokens and max_completion_tokens differ: give one", param="max_tokens"
      )
    if self.top_logprobs is not None and not self.logprobs:
      raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    if self.tool_choice not in (None, "auto", "none"):
      raise ApiError(
        400,
        'tool_choice must be "auto" or "none": this server cannot force a call',
        param="tool_choice",
        code="unsupported_parameter",
      )
    return self


class CompletionIn(_Common):
  """The body of /v1/completions: a text, several, token ids, or several lists of them."""

  prompt: Prompt
  logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP)
