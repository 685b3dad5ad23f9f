"""Messages to ids: by the template, and around what a template does not know."""

import pytest

from rome.rollout.serve import chat, schemas
from rome.rollout.serve.errors import ApiError
from rome.text import ByteTokenizer, Tokenizer
from rome.text.templates import encode_chat
from tests.pretrained import smollm2_gguf

BYTES = ByteTokenizer()
TOOL = {
  "type": "function",
  "function": {"name": "sh", "parameters": {"type": "object", "properties": {}}},
}
CALL = {
  "id": "call_1",
  "type": "function",
  "function": {"name": "sh", "arguments": '{"command": "ls"}'},
}
TURNS = [
  {"role": "user", "content": "look"},
  {"role": "assistant", "content": None, "tool_calls": [CALL]},
  {"role": "tool", "tool_call_id": "call_1", "content": "a"},
  {"role": "tool", "tool_call_id": "call_2", "content": "b"},
]


def shown(tokenizer, messages, **fields):
  body = schemas.ChatIn.model_validate({"model": "m", "messages": messages, **fields})
  return tokenizer.decode(chat.encode(tokenizer, body))


@pytest.fixture(scope="module")
def smollm2():
  return Tokenizer.from_dir(smollm2_gguf())


def test_without_tools_it_is_the_template(smollm2):
  messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u<|im_end|>"}]
  for tokenizer in (BYTES, smollm2):
    body = schemas.ChatIn.model_validate({"model": "m", "messages": messages})
    wanted = encode_chat(tokenizer, messages, add_generation_prompt=True)
    assert chat.encode(tokenizer, body) == wanted


def test_developers_and_parts():
  messages = [
    {"role": "developer", "content": [{"type": "text", "text": "a"}]},
    {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
  ]
  wanted = "<|bos|><|system|>a<|end|><|user|>b\nc<|end|><|assistant|>"
  assert shown(BYTES, messages) == wanted


def test_tools_reach_a_template_that_does_not_know_them(smollm2):
  for tokenizer, words in ((BYTES, "tools: sh("), (smollm2, '<tools>\n{"type": "function"')):
    for system in ([], [{"role": "system", "content": "be brief"}]):
      text = shown(tokenizer, [*system, TURNS[0]], tools=[TOOL])
      assert words in text and "look" in text
      assert ("be brief" in text) == bool(system)
    assert words not in shown(tokenizer, TURNS[:1], tools=[TOOL], tool_choice="none")


def test_calls_and_results_reach_a_template_that_does_not_know_them(smollm2):
  call = '<tool_call>\n{"name": "sh", "arguments": {"command": "ls"}}\n</tool_call>'
  text = shown(smollm2, TURNS)
  assert f"<|im_start|>assistant\n{call}<|im_end|>" in text
  results = "<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response>"
  assert f"<|im_start|>user\n{results}<|im_end|>" in text
  told = '<|assistant|><|call|>sh {"command": "ls"}<|end|><|tool|>a<|end|><|tool|>b<|end|>'
  assert told in shown(BYTES, TURNS, tools=[TOOL])


def test_a_template_that_knows_tools_gets_them_as_they_are():
  tokenizer = ByteTokenizer()
  tokenizer.chat_templates = {
    "default": "{{ tools[0].function.name }}{% for m in messages %}{% if m.role == 'tool' %}T"
    "{{ m.tool_call_id }}{% elif m.tool_calls %}{{ m.content }}{{ m.tool_calls[0].function."
    "arguments.command }}{% else %}{{ m.content }}{% endif %},{% endfor %}"
  }
  assert shown(tokenizer, TURNS, tools=[TOOL]) == "shlook,ls,Tcall_1,Tcall_2,"


def test_variables_of_the_template():
  tokenizer = ByteTokenizer()
  tokenizer.chat_templates = {"default": "{{ enable_thinking }}"}
  messages = TURNS[:1]
  assert shown(tokenizer, messages, chat_template_kwargs={"enable_thinking": False}) == "False"
  with pytest.raises(ApiError, match="a field of its own"):
    shown(tokenizer, messages, chat_template_kwargs={"messages": []})


@pytest.mark.parametrize("arguments", ["[]", "{", "3", '"{}"', 9000 * "["])
def test_arguments_that_are_no_object(arguments):
  call = {"type": "function", "function": {"name": "sh", "arguments": arguments}}
  with pytest.raises(ApiError, match="no JSON object"):
    shown(BYTES, [TURNS[0], {"role": "assistant", "tool_calls": [call]}])


def test_what_the_template_refuses_is_a_bad_request():
  tokenizer = ByteTokenizer()
  tokenizer.chat_templates = {"default": "{{ raise_exception('roles must alternate') }}"}
  with pytest.raises(ApiError, match="roles must alternate") as error:
    shown(tokenizer, TURNS)
  assert error.value.status == 400
