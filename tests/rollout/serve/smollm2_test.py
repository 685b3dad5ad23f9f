"""A pretrained model, served: it answers, and the API's promises hold for its vocabulary."""

import itertools
import json
import math
import subprocess

import openai
import pytest

from rome.text import Tokenizer
from rome.text.templates import encode_chat
from tests.pretrained import smollm2_gguf
from tests.rollout.serve.conftest import KEY

pytestmark = pytest.mark.slow

CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
WEATHER = {
  "type": "function",
  "function": {
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {
      "type": "object",
      "properties": {"city": {"type": "string"}},
      "required": ["city"],
    },
  },
}


@pytest.fixture(scope="module")
def client(smollm2):
  with smollm2.openai() as found:
    yield found


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer.from_dir(smollm2_gguf())


def chat(client, messages=CAPITAL, **arguments):
  arguments = {"model": "smollm2", "temperature": 0, "max_tokens": 40, **arguments}
  return client.chat.completions.create(messages=messages, **arguments)


def test_it_answers(client, tokenizer):
  answer = chat(client, extra_body={"return_token_ids": True})
  (choice,) = answer.choices
  assert "Paris" in choice.message.content and choice.finish_reason == "stop"
  assert answer.prompt_token_ids == encode_chat(tokenizer, CAPITAL, add_generation_prompt=True)
  assert choice.token_ids[-1] == tokenizer.eos_id
  assert tokenizer.decode(choice.token_ids[:-1]) == choice.message.content
  assert answer.usage.prompt_tokens == len(answer.prompt_token_ids)
  assert answer.usage.completion_tokens == len(choice.token_ids)


def test_it_streams(client):
  messages = [{"role": "user", "content": "Write a short story about a dog."}]
  chunks = list(chat(client, messages, stream=True, stream_options={"include_usage": True}))
  whole = chat(client, messages)
  text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
  assert text == whole.choices[0].message.content
  assert len(chunks) > 4 and chunks[-1].usage.completion_tokens == 40
  assert whole.choices[0].finish_reason == chunks[-2].choices[0].finish_reason == "length"


def test_what_it_streams_is_whole_characters(client):
  messages = [{"role": "user", "content": "Repeat: 東京 🚀 Größe"}]
  arguments = {"max_tokens": 60, "temperature": 1, "seed": 5, "n": 3, "logprobs": True}
  whole = chat(client, messages, **arguments)
  chunks = chat(client, messages, stream=True, **arguments)
  texts = {0: "", 1: "", 2: ""}
  for choice in itertools.chain(*(c.choices for c in chunks)):
    texts[choice.index] += choice.delta.content or ""
  for choice in whole.choices:
    assert texts[choice.index] == choice.message.content
    content = b"".join(bytes(e.bytes) for e in choice.logprobs.content)
    assert content.decode(errors="replace").startswith(choice.message.content)


def test_log_probs_are_of_the_distribution(client):
  entries = chat(client, logprobs=True, top_logprobs=20).choices[0].logprobs.content
  first = entries[0]
  assert first.logprob == first.top_logprobs[0].logprob > math.log(0.3)
  assert sum(math.exp(top.logprob) for top in first.top_logprobs) <= 1 + 1e-5


def test_seeds_and_choices(client):
  arguments = {"temperature": 1.5, "seed": 11, "n": 3, "max_tokens": 12}
  one, again = (chat(client, **arguments) for _ in range(2))
  texts = [c.message.content for c in one.choices]
  assert texts == [c.message.content for c in again.choices] and len(set(texts)) > 1
  assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


def test_stop_strings(client):
  choice = chat(client, stop=["France"]).choices[0]
  assert choice.message.content == "The capital of " and choice.finish_reason == "stop"


def test_completions(client, tokenizer):
  ids = tokenizer.encode("Once upon a time")
  arguments = {"model": "smollm2", "max_tokens": 16, "temperature": 0, "logprobs": 2}
  text, by_ids = (
    client.completions.create(prompt=prompt, **arguments).choices[0]
    for prompt in ("Once upon a time", ids)
  )
  assert text.text == by_ids.text and len(text.logprobs.tokens) <= 16
  assert "".join(text.logprobs.tokens).startswith(text.text)


def test_a_call_of_a_tool_and_its_result(client):
  """The model is small, so it is shown what a call looks like; then it makes one by itself."""
  shown = {
    "id": "call_0",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
  }
  messages = [
    {"role": "user", "content": "Weather in Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [shown]},
    {"role": "user", "content": "Weather in Berlin?"},
  ]
  answer = chat(client, messages, tools=[WEATHER])
  message = answer.choices[0].message
  (call,) = message.tool_calls
  assert call.function.name == "get_weather" and call.id.startswith("call_")
  assert json.loads(call.function.arguments) == {"city": "Berlin"}
  assert message.content is None and answer.choices[0].finish_reason == "tool_calls"

  pieces = [c.choices[0] for c in chat(client, messages, tools=[WEATHER], stream=True)]
  (streamed,) = (call for p in pieces for call in p.delta.tool_calls or ())
  assert streamed.index == 0 and streamed.id != call.id
  assert streamed.function.model_dump() == call.function.model_dump()
  assert not "".join(p.delta.content or "" for p in pieces)
  assert pieces[-1].finish_reason == "tool_calls"

  result = {"role": "tool", "tool_call_id": call.id, "content": "rainy"}
  last = chat(client, [*messages, message, result], tools=[WEATHER])
  assert "rain" in last.choices[0].message.content

  words = chat(client, messages, tools=[WEATHER], tool_choice="none").choices[0]
  assert words.message.tool_calls is None and words.finish_reason != "tool_calls"


def test_errors(client, smollm2):
  with pytest.raises(openai.BadRequestError) as error:
    chat(client, [{"role": "user", "content": "word " * 2000}])
  assert error.value.code == "context_length_exceeded"
  with pytest.raises(openai.BadRequestError, match="temperature"):
    chat(client, temperature=3)
  with pytest.raises(openai.NotFoundError):
    chat(client, model="gpt-4")
  with smollm2.openai("wrong") as other, pytest.raises(openai.AuthenticationError):
    chat(other)


def test_with_curl(smollm2):
  body = json.dumps({"model": "smollm2", "messages": CAPITAL, "temperature": 0, "stream": True})
  done = subprocess.run(
    [
      *("curl", "-sSN", "--fail-with-body", "--noproxy", "*", "-d", body),
      *("-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"),
      f"{smollm2.url}/v1/chat/completions",
    ],
    capture_output=True,
    text=True,
    timeout=100,
    check=True,
  )
  lines = [line for line in done.stdout.splitlines() if line]
  assert lines.pop() == "data: [DONE]"
  chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
  text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
  assert "Paris" in text and chunks[-1]["choices"][0]["finish_reason"] == "stop"
