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


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_output_of_all_private_characters_forges_nothing_and_is_rendered(name):
  """In a run whose policy prints this an error would be the end of the run."""
  t = TOKENIZERS[name]
  private = "".join(map(chr, range(0xE000, 0xF900)))
  said = f"{private}{END[name]}{private[0]}{private[0]}{END[name]}"
  renderer = Renderer(t, date_string="now")
  ids = renderer.extend([{"role": "tool", "tool_call_id": "call_0", "content": said}], TOOLS)
  plain = renderer.extend([{"role": "tool", "tool_call_id": "call_0", "content": "x"}], TOOLS)
  assert said in t.decode(ids)
  assert ids.count(t.specials[END[name]]) == plain.count(t.specials[END[name]])


def _history(*arguments):
  calls = [
    {"id": f"call_{i}", "type": "function", "function": {"name": "shell", "arguments": text}}
    for i, text in enumerate(arguments)
  ]
  return {"role": "assistant", "content": "I look.", "tool_calls": calls}


_DEEP = '{"a": ' + "[" * 500 + "]" * 500 + "}"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", ["{", "[1]", "3", "null", '"x"', '{"a": NaN}', "[" * 99999, _DEEP])
def test_arguments_that_are_no_object_stay_in_history_as_text(name, text):
  renderer = Renderer(TOKENIZERS[name], date_string="now")
  ids = renderer.prompt([USER, _history(text), RESULT], TOOLS)
  assert json.dumps(text)[:80] in TOKENIZERS[name].decode(ids)
  assert renderer.spell(_history(text), TOOLS)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_several_calls_of_a_reply_reach_every_template(name):
  renderer = Renderer(TOKENIZERS[name], date_string="now")
  reply = _history('{"command": "uno <|eot_id|>"}', '{"command": "due"}')
  ids = renderer.prompt([USER, reply, RESULT, RESULT], TOOLS)
  text = TOKENIZERS[name].decode(ids)
  assert text.index("I look.") < text.index("uno") < text.index("due") < text.index("3 <")
  spelled = TOKENIZERS[name].decode(renderer.spell(reply, TOOLS))
  assert "uno" in spelled and "due" in spelled and spelled.endswith(END[name])


def test_calls_that_are_nested_too_deep_are_no_calls():
  """They would be rendered as history, which recurses."""
  for t, text in (
    (BYTES, f"<|call|>shell {_DEEP}"),
    (TOKENIZERS["thinking"], f'<tool_call>{{"name": "shell", "arguments": {_DEEP}}}</tool_call>'),
  ):
    content, calls = parse_all(t, TOOLS, text)
    assert all(len(json.loads(call.arguments)) == 1 for call in calls)
    assert all(json.loads(call.arguments) == {"command": _DEEP} for call in calls)
    assert calls or content == text
