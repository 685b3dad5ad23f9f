"""Replies are data: well-formed ones become calls, everything else says what was wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rome.agent import MalformedCall, ToolCall, parse_reply
from rome.text import ByteTokenizer

T = ByteTokenizer()


def reply(*parts):
  """Ids of text parts and special ids."""
  ids = []
  for part in parts:
    ids += T.encode(part) if isinstance(part, str) else [part]
  return ids


@pytest.mark.parametrize(
  ("parts", "name", "argument"),
  [
    ([T.call, "sh ls -la", T.end], "sh", "ls -la"),
    ([T.call, "submit", T.end], "submit", ""),
    (["I look first.", T.call, "sh cat a b", T.end], "sh", "cat a b"),
    ([T.call, "sh  two  spaces ", T.end], "sh", " two  spaces "),
    ([T.call, "sh echo a\necho b", T.end], "sh", "echo a\necho b"),
    ([T.call, "sh echo '<|end|>'", T.end], "sh", "echo '<|end|>'"),
    ([T.call, "sh echo é", T.end], "sh", "echo é"),
    (["odd but legal", T.tool, T.bos, T.call, "sh ls", T.end], "sh", "ls"),
  ],
)
def test_well_formed(parts, name, argument):
  assert parse_reply(reply(*parts), T) == ToolCall(name, argument)


@pytest.mark.parametrize(
  ("parts", "message"),
  [
    ([], "error: reply cut off"),
    ([T.call, "sh ls"], "error: reply cut off"),
    ([T.end, "x"], "error: reply cut off"),
    ([T.end], "error: 0 tool calls in the reply, want 1"),
    (["<|call|>sh ls", T.end], "error: 0 tool calls in the reply, want 1"),
    ([T.call, "sh ls", T.call, "submit", T.end], "error: 2 tool calls in the reply, want 1"),
    ([T.call, "sh ls", T.end, T.end], "error: special token in the tool call"),
    ([T.call, T.tool, "sh ls", T.end], "error: special token in the tool call"),
    ([T.call, T.end], "error: no tool '', want sh or submit"),
    ([T.call, "python x", T.end], "error: no tool 'python', want sh or submit"),
    ([T.call, " sh ls", T.end], "error: no tool '', want sh or submit"),
    ([T.call, "sh\nls", T.end], "error: no tool 'sh\\nls', want sh or submit"),
    ([T.call, "x" * 1000, T.end], f"error: no tool '{'x' * 16}', want sh or submit"),
    ([T.call, "sh", T.end], "error: sh needs a command"),
    ([T.call, "sh  \n ", T.end], "error: sh needs a command"),
  ],
)
def test_malformed(parts, message):
  assert parse_reply(reply(*parts), T) == MalformedCall(message)


@given(st.lists(st.integers(0, T.vocab_size - 1), max_size=40))
def test_any_ids_give_a_call_or_an_observation(ids):
  call = parse_reply(ids, T)
  if isinstance(call, MalformedCall):
    assert call.message.startswith("error: ") and len(call.message) < 200
  else:
    assert call.name in ("sh", "submit") and ids[-1] == T.end and ids.count(T.call) == 1


# Ids that come near a call, where plain random ones hardly ever do.
_PARTS = [[T.call], [T.end], [T.tool], *map(T.encode, ["sh", " ", "ls", "submit", "\n", "\0"])]


@given(st.lists(st.sampled_from(_PARTS), max_size=8))
def test_near_misses_never_raise(parts):
  ids = sum(parts, [])
  assert isinstance(parse_reply(ids, T), (ToolCall, MalformedCall))


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip))
def test_a_command_arrives_as_it_was_written(command):
  assert parse_reply(reply(T.call, f"sh {command}", T.end), T) == ToolCall("sh", command)
