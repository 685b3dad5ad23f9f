"""Calls in a reply's text: found whole or in pieces, and what is none stays text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rome.text.tool_calls import ToolParser


def parse(text, cuts=()):
  """Content and calls (name, arguments) of a reply that comes in pieces, cut at these places."""
  parser, content, calls = ToolParser(), "", []
  edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
  for i, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
    more, found = parser.push(text[start:end], last=i == len(edges) - 2)
    content += more
    calls += found
  assert parser.count == len(calls)
  assert len({c.id for c in calls}) == len(calls)
  return content, [(c.name, json.loads(c.arguments)) for c in calls]


def call(name, **arguments):
  body = json.dumps({"name": name, "arguments": arguments})
  return f"<tool_call>\n{body}\n</tool_call>"


LS = call("sh", command="ls")


@pytest.mark.parametrize(
  "text, content, names",
  [
    ("", "", []),
    ("no call\n", "no call\n", []),
    (LS, "", ["sh"]),
    (f"I look.\n{LS}", "I look.", ["sh"]),
    (f"{LS}\n{call('submit')}\n", "", ["sh", "submit"]),
    (f"a {LS} b {LS} c ", "a b c ", ["sh", "sh"]),
    (f"<tool_call>oops</tool_call> {LS}", "<tool_call>oops</tool_call>", ["sh"]),
    (f"<tool_call> {LS}", "<tool_call>", ["sh"]),
    ("a < b <tool", "a < b <tool", []),
    (LS.removesuffix("</tool_call>"), LS.removesuffix("</tool_call>"), []),
    (call("say", text="</tool_call>"), "", ["say"]),
    (call("say", text=f"a {LS} b"), "", ["say"]),
  ],
)
def test_what_is_found(text, content, names):
  found, calls = parse(text)
  assert found == content
  assert [name for name, _ in calls] == names


@pytest.mark.parametrize(
  "body",
  [
    "{}",
    '{"name": "sh"}',
    '{"name": "", "arguments": {}}',
    '{"name": 3, "arguments": {}}',
    '{"name": "sh", "arguments": "ls"}',
    '{"name": "sh", "arguments": {"x": NaN}}',
    '{"name": "sh", "arguments": {"x": "open}}',
    '[{"name": "sh", "arguments": {}}]',
    '{"name": "sh", "arguments": {}} {}',
    '{"name": "sh", "arguments": ' + 5000 * "[" + 5000 * "]" + "}",
    '{"name": "sh", "arguments": {"x": ' + 5000 * "9" + "}}",
  ],
)
def test_malformed_calls_stay_text(body):
  text = f"<tool_call>{body}</tool_call> and so on"
  assert parse(text) == (text, [])
  assert parse(text + LS) == (text, [("sh", {"command": "ls"})])


_PARTS = st.sampled_from(
  [
    LS,
    "<tool_call>",
    "</tool_call>",
    '{"name": "x", "arguments": {"a": "',
    '"}}',
    " ",
    "\n",
    "text",
  ]
)


@given(st.lists(_PARTS, max_size=8).map("".join), st.lists(st.integers(0, 300), max_size=5))
def test_pieces_make_no_difference(text, cuts):
  assert parse(text, cuts) == parse(text)


@given(st.lists(_PARTS, max_size=8).map("".join))
def test_nothing_is_lost_but_space(text):
  content, calls = parse(text)
  spelled = content + "".join(json.dumps([name, arguments]) for name, arguments in calls)
  assert len(spelled) + 40 * len(calls) >= len("".join(text.split())) - 40 * len(calls)
  if not calls:
    assert content == text


def test_content_is_not_held_back_without_need():
  parser = ToolParser()
  assert parser.push("I think so, ")[0] == "I think so,"
  assert parser.push("a <too")[0] == " a"
  assert parser.push("l that")[0] == " <tool that"
  assert parser.push("<tool_call>no")[0] == "<tool_call>no"
