"""Reads a tool call out of the token ids of one reply.

A reply is `[thought] <|call|> NAME [ARGUMENT] <|end|>`. A reply that is not one is a
`MalformedCall` whose text the policy gets back as its observation: bad model output is data, never
an exception. Several calls in one reply are not here yet.
"""

import dataclasses
from collections.abc import Sequence

from rome.text import ByteTokenizer

TOOLS = ("sh", "submit")


@dataclasses.dataclass(frozen=True)
class ToolCall:
  """One well-formed call: the tool's name and its raw argument text."""

  name: str
  argument: str


@dataclasses.dataclass(frozen=True)
class MalformedCall:
  """What was wrong with a reply, worded for the policy."""

  message: str


def parse_reply(ids: Sequence[int], tokenizer: ByteTokenizer) -> ToolCall | MalformedCall:
  """The call in the reply `ids` (with or without the final `<|end|>`)."""
  ids = list(ids)
  if ids and ids[-1] == tokenizer.end:
    ids.pop()
  else:
    return MalformedCall("error: reply cut off")
  calls = [i for i, token in enumerate(ids) if token == tokenizer.call]
  if len(calls) != 1:
    return MalformedCall(f"error: {len(calls)} tool calls in the reply, want 1")
  body = ids[calls[0] + 1 :]
  if any(token >= 256 for token in body):
    return MalformedCall("error: special token in the tool call")
  name, _, argument = tokenizer.decode(body).partition(" ")
  if name not in TOOLS:
    return MalformedCall(f"error: no tool {name[:16]!r}, want sh or submit")
  if name == "sh" and not argument.strip():
    return MalformedCall("error: sh needs a command")
  return ToolCall(name, argument)
