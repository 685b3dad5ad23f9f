"""The JSON that goes out, typed for the OpenAPI description. Handlers write it directly."""

from typing import Any, Literal

import pydantic
from pydantic import Field


class PromptDetails(pydantic.BaseModel):
  """What became of the prompt's tokens."""

  cached_tokens: int = Field(description="keys and values were known from earlier requests")


class Usage(pydantic.BaseModel):
  """Exact counts; each prompt counts once, whatever `n` is."""

  prompt_tokens: int
  completion_tokens: int = Field(description="sampled tokens, stop tokens included")
  total_tokens: int
  prompt_tokens_details: PromptDetails


class _Answer(pydantic.BaseModel):
  id: str
  created: int = Field(description="seconds since 1970")
  model: str
  system_fingerprint: str = Field(description="rome-v and the version of the weights")
  choices: list[dict[str, Any]]
  usage: Usage


class ChatCompletion(_Answer):
  """The answer of /v1/chat/completions."""

  object: Literal["chat.completion"]
  prompt_token_ids: list[int] | None = None


class Completion(_Answer):
  """The answer of /v1/completions."""

  object: Literal["text_completion"]


class Model(pydantic.BaseModel):
  """A model that is served."""

  id: str
  object: Literal["model"] = "model"
  created: int
  owned_by: str = "rome"
  max_model_len: int = Field(description="tokens of a prompt and its reply together")


class ModelList(pydantic.BaseModel):
  """The models that are served: one."""

  object: Literal["list"] = "list"
  data: list[Model]


class Health(pydantic.BaseModel):
  """How the server is."""

  status: Literal["ok", "draining"]
  version: int = Field(description="of the weights")
