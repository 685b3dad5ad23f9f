"""Messages to token ids, by the checkpoint's own chat template.

Templates differ in what they know. Where one never reads `tools`, `tool_calls` or the role "tool",
what it would drop is put into words of Hermes and Qwen first: signatures at the end of the system
message, calls in the assistant's content, results in a user's message. So tools reach every model
that has a template, and `rome.rollout.serve.tools` reads the replies.

Special tokens in messages stay text (`rome.text.templates.encode_chat`). Left out: documents,
images, continuing the last message.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any

from rome.rollout.serve import schemas
from rome.rollout.serve.errors import ApiError
from rome.rollout.serve.tools import CLOSE, OPEN
from rome.text import Tokenizer
from rome.text.templates import encode_chat

_OWN = ("messages", "tools", "documents", "add_generation_prompt")
# The words of Qwen2.5's template.
_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def encode(tokenizer: Tokenizer, body: schemas.ChatIn) -> list[int]:
  """Token ids of a conversation, up to where the reply begins.

  Raises:
    ApiError: 400, the template refuses the messages, or a call's arguments are no JSON object.
  """
  messages = [_message(m) for m in body.messages or ()]
  tools = [t.model_dump(exclude_none=True) for t in body.tools or ()]
  if body.tool_choice == "none":
    tools = []
  variables = body.chat_template_kwargs or {}
  for name in _OWN:
    if name in variables:
      raise ApiError(400, f"{name} has a field of its own", param="chat_template_kwargs")
  source = "\n".join(tokenizer.chat_templates.values())
  try:
    messages = _adapted(messages, tools, source)
    if "tools" not in source:
      tools = []
    return encode_chat(tokenizer, messages, tools or None, True, **variables)
  except (RecursionError, ValueError) as error:
    raise ApiError(400, f"messages: {error}", param="messages", code="chat_template") from None


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


def _adapted(messages: list[dict], tools: Sequence[dict], source: str) -> list[dict]:
  """Messages in which nothing is left that the template would drop."""
  if "tool_calls" not in source:
    messages = [_spelled_out(m) for m in messages]
  if "'tool'" not in source and '"tool"' not in source:
    messages = _results_of_users(messages)
  if tools and "tools" not in source:
    signatures = "\n".join(json.dumps(t, ensure_ascii=False) for t in tools)
    words = _TOOLS.format(signatures=signatures)
    if messages and messages[0]["role"] == "system":
      first, *rest = messages
      return [{**first, "content": f"{first['content']}\n\n{words}"}, *rest]
    return [{"role": "system", "content": words}, *messages]
  return messages


def _spelled_out(message: dict) -> dict:
  """The message with its calls in its content."""
  calls = message.pop("tool_calls", ())
  parts = [message["content"]] if message["content"] else []
  for call in calls:
    parts.append(f"{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}")
  return {**message, "content": "\n".join(parts)}


def _results_of_users(messages: list[dict]) -> list[dict]:
  """Neighbouring results of tools as one message of the user."""
  found: list[dict] = []
  for is_tool, group in itertools.groupby(messages, lambda m: m["role"] == "tool"):
    if not is_tool:
      found += group
      continue
    results = (f"<tool_response>\n{m['content']}\n</tool_response>" for m in group)
    found.append({"role": "user", "content": "\n".join(results)})
  return found
