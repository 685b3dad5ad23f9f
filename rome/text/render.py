"""Conversations as token ids that only ever grow.

`Renderer.prompt` renders a whole conversation once, by the tokenizer's own chat template.
`Renderer.extend` renders only what comes after a finished reply, so that a context is

    prompt(messages), sampled ids, extend(new messages), sampled ids, extend(...), ...

and nothing is tokenised twice: sampled ids stay as they were sampled, thinking included, also where
the template would write the reply differently once it is history. A turn costs what is new in it.

Templates differ in what they know. Where one never reads `tools`, `tool_calls` or the role "tool",
what it would drop is put into words first: signatures at the end of the system message, calls in
the assistant's content, results in a user's message; the words are those of Hermes and Qwen, or the
byte tokenizer's. So tools reach every model that has a template, and `rome.text.tool_calls` reads
the replies. So are several calls of a reply where the template refuses them. Arguments that are no
JSON object stand in history as `{"arguments": TEXT}`. Special tokens in messages stay text
(`rome.text.templates.encode_chat`).

Left out: templates that refuse a tool's result behind a reply without calls (Mistral's).
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rome.text.templates import encode_chat
from rome.text.tokenizer import Tokenizer
from rome.text.tool_calls import BARE, Schemas, json_object, parse_all, spell

Message = dict[str, Any]

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
# What may come behind a reply: a template that reads the tools there writes this differently.
_BEHIND = [
  {"role": "tool", "tool_call_id": "call", "content": "."},
  {"role": "user", "content": "."},
]
_REPLY = "\ue000the reply\ue001"  # stands for a reply whose ids are known
_BEFORE = [{"role": "user", "content": "."}, {"role": "assistant", "content": _REPLY}]


class Renderer:
  """Renders conversations for one tokenizer.

  Args:
    tokenizer: it must have a chat template.
    variables: what else the template reads, such as `enable_thinking`.
  """

  def __init__(self, tokenizer: Tokenizer, **variables: Any):
    self.tokenizer = tokenizer
    self._variables = variables
    self._source = "\n".join(tokenizer.chat_templates.values())
    self._read: tuple[Schemas, bool] | None = None  # tools, whether they are read behind a reply

  def prompt(self, messages: Sequence[Message], tools: Schemas = ()) -> list[int]:
    """Ids of a conversation, up to where the next reply begins.

    Args:
      messages: in the form of the OpenAI API; arguments of calls as text or objects.
      tools: schemas of the tools, in the form of the OpenAI API.
    Raises:
      ValueError: the template refuses them.
    """
    return self._encode([_plain(m) for m in messages], tools)

  def extend(
    self, messages: Sequence[Message], tools: Schemas = (), last: int | None = None
  ) -> list[int]:
    """Ids from the end of a sampled reply up to where the next one begins.

    Args:
      messages: what comes after the reply, at least one message.
      tools: as for `prompt`.
      last: the last sampled id. Where it ends a turn it is not given again; a reply that was cut
        off is closed.
    Raises:
      ValueError: the template refuses them.
    """
    if not messages:
      raise ValueError("extend needs at least one message behind the reply")
    known = self._read_behind(tools)
    ids = self._encode([*_BEFORE, *(_plain(m) for m in messages)], known, after=_REPLY)
    if last in self.tokenizer.specials.values() and ids[0] == last:
      return ids[1:]
    return ids

  def parse(
    self, ids: Sequence[int], tools: Schemas = (), stop_tokens: Sequence[int] = ()
  ) -> Message:
    """A sampled reply as a message: `role`, `content`, and `tool_calls` where there are any.

    Args:
      ids: sampled ids.
      tools: as for `prompt`.
      stop_tokens: ids that end a reply and are no part of its text.
    """
    ids = list(ids[:-1] if ids and ids[-1] in stop_tokens else ids)
    content, calls = parse_all(self.tokenizer, tools, self.tokenizer.decode(ids))
    message: Message = {"role": "assistant", "content": content}
    if calls:
      message["tool_calls"] = [call.message() for call in calls]
    return message

  def spell(self, message: Message, tools: Schemas = ()) -> list[int]:
    """A reply whose sampled ids are not known, as the template writes it, its end included.

    For counting: what a policy sampled is not made again from text.
    """
    user = {"role": "user", "content": _REPLY}
    head = self._encode([user], tools, after=_REPLY)
    ids = self._encode([user, _plain(message)], tools, after=_REPLY, opened=False)
    ids = ids[len(head) :] if ids[: len(head)] == head else ids
    ends = [i for i, token in enumerate(ids) if token in self.tokenizer.specials.values()]
    return ids[: ends[-1] + 1] if ends else ids

  def _encode(
    self, messages: list[Message], tools: Schemas, after: str = "", opened: bool = True
  ) -> list[int]:
    messages = self._adapted(messages, tools, whole=not after)
    known = [dict(t) for t in tools] if "tools" in self._source else []

    def encode(messages: list[Message]) -> list[int]:
      return encode_chat(
        self.tokenizer, messages, known or None, opened, after=after, **self._variables
      )

    try:
      return encode(messages)
    except ValueError:  # as of Llama's template, which knows one call a message
      several = [len(m.get("tool_calls", ())) > 1 for m in messages]
      if not any(several):
        raise
    pairs = zip(messages, several, strict=True)
    return encode([self._spelled_out(m, tools) if many else m for m, many in pairs])

  def _read_behind(self, tools: Schemas) -> Schemas:
    """The tools, or none where the template does not read them behind a reply: they are long."""
    if not tools or "tool_use" in self.tokenizer.chat_templates:
      return tools
    if self._read is None or self._read[0] is not tools:
      messages = [*_BEFORE, *_BEHIND]
      try:
        with_tools = self._encode(messages, tools, after=_REPLY)
        self._read = tools, with_tools != self._encode(messages, (), after=_REPLY)
      except ValueError:  # these messages are refused, others may not be
        self._read = tools, True
    return tools if self._read[1] else ()

  def _adapted(self, messages: list[Message], tools: Schemas, whole: bool) -> list[Message]:
    """Messages in which nothing is left that the template would drop."""
    source = self._source
    if "tool_calls" not in source:
      messages = [self._spelled_out(m, tools) for m in messages]
    if "'tool'" not in source and '"tool"' not in source:
      messages = _results_of_users(messages)
    if tools and whole and "tools" not in source:
      words = self._signatures(tools)
      if messages and messages[0]["role"] == "system":
        first, *rest = messages
        return [{**first, "content": f"{first['content']}\n\n{words}"}, *rest]
      return [{"role": "system", "content": words}, *messages]
    return messages

  def _signatures(self, tools: Schemas) -> str:
    if BARE in self.tokenizer.specials:
      return "tools: " + " ".join(_signature(tool["function"]) for tool in tools)
    return _TOOLS.format(signatures="\n".join(json.dumps(t, ensure_ascii=False) for t in tools))

  def _spelled_out(self, message: Message, tools: Schemas) -> Message:
    """The message with its calls in its content."""
    message = dict(message)
    parts = [message["content"]] if message["content"] else []
    for call in message.pop("tool_calls", ()):
      function = call["function"]
      parts.append(spell(self.tokenizer, tools, function["name"], function["arguments"]))
    joint = "" if BARE in self.tokenizer.specials else "\n"
    return {**message, "content": joint.join(parts)}


def _signature(function: Mapping[str, Any]) -> str:
  return f"{function['name']}({','.join((function.get('parameters') or {}).get('properties', ()))})"


def _plain(message: Message) -> Message:
  """The message with content and with the arguments of its calls as objects, as templates want."""
  found = {**message, "content": message.get("content") or ""}
  if calls := found.pop("tool_calls", None):
    found["tool_calls"] = [_with_object(call) for call in calls]
  return found


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
  """The call with an object as its arguments; what a model wrote that is none becomes a string."""
  function = dict(call["function"])
  if isinstance(text := function["arguments"], str):
    found = json_object(text or "{}")
    function["arguments"] = {"arguments": text} if found is None else found
  return {**call, "function": function}


def _results_of_users(messages: list[Message]) -> list[Message]:
  """Neighbouring results of tools as one message of the user."""
  found: list[Message] = []
  for is_tool, group in itertools.groupby(messages, lambda m: m["role"] == "tool"):
    if not is_tool:
      found += group
      continue
    results = (f"<tool_response>\n{m['content']}\n</tool_response>" for m in group)
    found.append({"role": "user", "content": "\n".join(results)})
  return found
