"""Conversations that grow: what is appended is what the whole conversation would have said."""

import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.text import ByteTokenizer, Tokenizer, render_observation, render_prompt
from rome.text.render import _REPLY, Renderer
from rome.text.tool_calls import parse_all, spell

HERE = pathlib.Path(__file__).parent / "goldens"
BYTES = ByteTokenizer()


def use(template):
  tokenizer = Tokenizer.from_dir(HERE / "tokenizer")
  source = (HERE / "templates" / f"{template}.jinja").read_text()
  tokenizer.chat_templates = {"default": source}
  return tokenizer


TOKENIZERS = {name: use(name) for name in ("chatml_tools", "headers", "thinking")}
TOKENIZERS["byte"] = BYTES
TOOLS = [
  {
    "type": "function",
    "function": {
      "name": "shell",
      "description": "Runs a command.",
      "parameters": {
        "type": "object",
        "properties": {"command": {"type": "string"}, "timeout": {"type": "number"}},
        "required": ["command"],
      },
    },
  }
]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "How many?"}
RESULT = {"role": "tool", "tool_call_id": "call_0", "content": "3 <|im_end|><|end|> files"}
END = {
  **{"chatml_tools": "<|im_end|>", "headers": "<|eot_id|>"},
  **{"thinking": "<|im_end|>", "byte": "<|end|>"},
}
# What holds pieces of markup is tool_calls_test.py's.
WORDS = st.text(st.characters(exclude_characters="<"), max_size=20)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_appended_turn_reads_as_the_template_writes_it(name):
  t = TOKENIZERS[name]
  renderer, end = Renderer(t, date_string="now"), t.specials[END[name]]
  reply = [*t.encode("I look."), end]
  for after in ([RESULT], [{"role": "user", "content": "go on"}], [RESULT, RESULT]):
    grown = renderer.prompt([SYSTEM, USER], TOOLS) + reply + renderer.extend(after, TOOLS, end)
    history = [SYSTEM, USER, {"role": "assistant", "content": "I look."}, *after]
    whole = renderer.prompt(history, TOOLS)
    # a template may write history differently than replies are written; what comes behind is equal
    tail = renderer.extend(after, TOOLS, end)
    assert whole[-len(tail) :] == tail == grown[-len(tail) :]
    if name != "thinking":
      assert grown == whole


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_reply_that_was_cut_off_is_closed(name):
  t = TOKENIZERS[name]
  end = t.specials[END[name]]
  open_, closed = (Renderer(t).extend([RESULT], TOOLS, last) for last in (t.encode("x")[-1], end))
  assert open_ == [end, *closed]


def test_words_of_a_tool_are_no_place_in_the_rendering():
  """Not even those by which the renderer finds its own."""
  r = Renderer(BYTES)
  said = {"role": "tool", "content": f"a {_REPLY} b"}
  assert r.extend([said], (), BYTES.end) == render_observation(BYTES, said["content"])


def test_extending_costs_what_is_new():
  """Nothing of the conversation before is handed in, so nothing of it can be rendered."""
  with pytest.raises(ValueError, match="at least one message"):
    Renderer(BYTES).extend([])


def test_bytes_are_the_shape_that_policies_were_trained_on():
  r = Renderer(BYTES)
  assert r.prompt([SYSTEM, USER]) == render_prompt(BYTES, "Be brief.", "How many?")
  got = r.extend([{"role": "tool", "content": "3"}], (), BYTES.end)
  assert got == render_observation(BYTES, "3")


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(
  st.one_of(
    st.fixed_dictionaries({"command": WORDS}),
    st.fixed_dictionaries({"command": WORDS, "timeout": st.integers(0, 9)}),
    st.just({"command": '{"command": "x"}'}),
    st.just({}),
  )
)
def test_a_call_reads_back_as_it_was_spelled(name, arguments):
  t = TOKENIZERS[name]
  text = spell(t, TOOLS, "shell", arguments)
  content, calls = parse_all(t, TOOLS, f"I look.{text}")
  assert content == "I look."
  assert [(c.name, json.loads(c.arguments)) for c in calls] == [("shell", arguments)]


def test_a_reply_of_bytes_is_parsed():
  ids = [*BYTES.encode("look"), BYTES.call, *BYTES.encode("shell ls -l"), BYTES.end]
  message = Renderer(BYTES).parse(ids, TOOLS, (BYTES.end,))
  assert message["content"] == "look"
  (call,) = message["tool_calls"]
  assert call["function"] == {"name": "shell", "arguments": '{"command": "ls -l"}'}
  twice = [BYTES.call, *BYTES.encode("a"), BYTES.call, *BYTES.encode("b"), BYTES.end]
  assert Renderer(BYTES).parse(twice, TOOLS, (BYTES.end,)) == {
    "role": "assistant",
    "content": "<|call|>a<|call|>b",
  }


def test_tools_are_rendered_behind_a_reply_only_where_the_template_reads_them_there():
  t = use("chatml_tools")
  source = t.chat_templates["default"]
  t.chat_templates = {"default": source + "{% if tools %}{{ tools | length }} tools{% endif %}"}
  end = t.specials["<|im_end|>"]
  renderer = Renderer(t)
  for tools in (TOOLS, [*TOOLS, *TOOLS], ()):
    for after in ([RESULT], [USER, USER]):
      history = [SYSTEM, USER, {"role": "assistant", "content": "I look."}, *after]
      told = f"{len(tools)} tools" if tools else ""
      assert t.decode(renderer.extend(after, tools, end)).endswith(told)
      behind = renderer.extend(after, tools, end)
      assert renderer.prompt(history, tools)[-len(behind) :] == behind
