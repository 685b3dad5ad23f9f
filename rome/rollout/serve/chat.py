"""A chat's messages to token ids (`rome.text.render`). Left out: documents, images, continuing the
last message.
"""

import json
from typing import Any

from rome.rollout.serve import schemas
from rome.rollout.serve.errors import ApiError
from rome.text import Tokenizer
from rome.text.render import Renderer

_OWN = ("messages", "tools", "documents", "add_generation_prompt")


def encode(tokenizer: Tokenizer, body: schemas.ChatIn) -> list[int]:
  """Token ids of a conversation, up to where the reply begins.

  Raises:
    ApiError: 400, the template refuses the messages, or a call's arguments are no JSON object.
  """
  messages = messages_of(body)
  variables = body.chat_template_kwargs or {}
  for name in _OWN:
    if name in variables:
      raise ApiError(400, f"{name} has a field of its own", param="chat_template_kwargs")
  try:
    return Renderer(tokenizer, **variables).prompt(messages, tools_of(body))
  except (RecursionError, ValueError) as error:
    raise ApiError(400, f"messages: {error}", param="messages", code="chat_template") from None


def messages_of(body: schemas.ChatIn) -> list[dict[str, Any]]:
  """The messages as templates expect them: contents as text, arguments of calls as objects.

  Raises:
    ApiError: 400, a call's arguments are no JSON object.
  """
  return [_message(m) for m in body.messages or ()]


def tools_of(body: schemas.ChatIn) -> list[dict[str, Any]]:
  """Schemas of the tools that the reply may call."""
  if body.tool_choice == "none":
    return []
  return [t.model_dump(exclude_none=True) for t in body.tools or ()]


def size(body: schemas.ChatIn) -> int:
  """Characters of all messages: no conversation is shorter."""
  return sum(len(_text(m.content)) for m in body.messages or ())


def _text(content: str | list[schemas.TextPart] | None) -> str:
  """Content as text; parts are lines, as in vLLM."""
  if content is None or isinstance(content, str):
    return content or ""
  return "\n".join(part.text for part in content)


def _message(message: schemas.Message) -> dict[str, Any]:
  """A message as templates expect it."""
  found = message.model_dump(exclude_none=True, exclude={"annotations"})
  found["content"] = _text(message.content)
  if message.role == "developer":
    found["role"] = "system"
  if isinstance(message, schemas.AssistantMessage) and message.tool_calls:
    found["tool_calls"] = [_call(c) for c in message.tool_calls]
  else:
    found.pop("tool_calls", None)
  return found


def _call(call: schemas.ToolCallIn) -> dict[str, Any]:
  """A call with its arguments as an object, which is what templates write as JSON."""
  try:
    arguments = json.loads(call.function.arguments or "{}")
  except (RecursionError, ValueError):
    arguments = None
  if not isinstance(arguments, dict):
    raise ApiError(
      400, f"the arguments of {call.function.name[:100]} are no JSON object", param="messages"
    )
  function = {"name": call.function.name, "arguments": arguments}
  found: dict[str, Any] = {"type": "function", "function": function}
  return found if call.id is None else {"id": call.id, **found}
