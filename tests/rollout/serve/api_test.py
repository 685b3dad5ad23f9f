"""What the API gives, through the official client: a live server with a random model of bytes."""

import itertools
import json
import math

import pytest

from rome.text import ByteTokenizer, render_prompt

pytestmark = pytest.mark.slow

T = ByteTokenizer()
HI = [{"role": "user", "content": "hi"}]
EXTRA = {"return_token_ids": True}


def chat(client, messages=HI, **arguments):
  arguments = {"model": "micro", "max_tokens": 24, "seed": 1, **arguments}
  return client.chat.completions.create(messages=messages, **arguments)


def complete(client, prompt, **arguments):
  arguments = {"model": "micro", "max_tokens": 24, "seed": 1, **arguments}
  return client.completions.create(prompt=prompt, **arguments)


def test_a_chat(client):
  answer = chat(client, extra_body=EXTRA)
  (choice,) = answer.choices
  assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
  assert answer.model == "micro" and answer.system_fingerprint == "rome-v0"
  assert choice.index == 0 and choice.message.role == "assistant"
  assert answer.prompt_token_ids == render_prompt(T, "", "hi")
  assert choice.finish_reason == ("length" if len(choice.token_ids) == 24 else "stop")
  whole = T.decode(choice.token_ids)
  assert choice.message.content == whole.removesuffix("<|end|>")
  assert choice.message.tool_calls is None and choice.logprobs is None
  assert len(choice.token_logprobs) == len(choice.token_ids) and choice.weight_version == 0
  assert all(-math.inf < logp <= 0 for logp in choice.token_logprobs)


def test_usage_is_exact(client):
  # A fresh prompt of 40 tokens, twice.
  prompt = [7, 11, *range(100, 138)]
  for cached in (0, 39):
    usage = complete(client, prompt, n=3, max_tokens=5, extra_body={"ignore_eos": True}).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (40, 15, 55)
    assert usage.prompt_tokens_details.cached_tokens == cached
  usage = complete(client, ["ab", "cde"], max_tokens=2, n=2, extra_body={"ignore_eos": True}).usage
  assert (usage.prompt_tokens, usage.completion_tokens) == (5, 8)


@pytest.mark.parametrize("given", ["abc", [97, 98, 99]])
def test_prompts_one_or_several(client, given):
  single = complete(client, given, extra_body=EXTRA).choices[0]
  several = complete(client, [given, given if isinstance(given, str) else [1]], extra_body=EXTRA)
  assert single.prompt_token_ids == [97, 98, 99]
  assert [c.index for c in several.choices] == [0, 1]
  assert several.choices[0].token_ids == single.token_ids
  assert several.choices[0].text == single.text


def test_a_stream_is_the_answer_in_pieces(client):
  arguments = {"n": 2, "logprobs": True, "top_logprobs": 2, "extra_body": EXTRA}
  whole = chat(client, **arguments)
  chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **arguments))
  assert len({c.id for c in chunks}) == 1
  assert all(c.object == "chat.completion.chunk" and c.model == "micro" for c in chunks)
  assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
  assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == (
    whole.usage.completion_tokens
  )
  assert all(c.prompt_token_ids == whole.prompt_token_ids for c in chunks[:2])
  for wanted in whole.choices:
    mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == wanted.index]
    assert mine[0].delta.role == "assistant" and mine[0].delta.content == ""
    assert all(m.delta.role is None for m in mine[1:])
    assert [m.finish_reason for m in mine] == [None] * (len(mine) - 1) + [wanted.finish_reason]
    assert "".join(m.delta.content or "" for m in mine) == wanted.message.content
    ids = itertools.chain(*(getattr(m, "token_ids", []) for m in mine))
    assert list(ids) == wanted.token_ids
    entries = [e for m in mine if m.logprobs for e in m.logprobs.content]
    assert entries == wanted.logprobs.content


def test_a_stream_of_a_completion(client):
  arguments = {"prompt": ["ab", "c"], "logprobs": 1, "extra_body": EXTRA}
  whole = complete(client, **arguments)
  chunks = list(complete(client, stream=True, **arguments))
  assert all(c.object == "text_completion" and c.usage is None for c in chunks)
  for wanted in whole.choices:
    mine = [c.choices[0] for c in chunks if c.choices[0].index == wanted.index]
    assert "".join(m.text for m in mine) == wanted.text
    assert mine[0].prompt_token_ids == wanted.prompt_token_ids
    assert mine[-1].finish_reason == wanted.finish_reason
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
      assert sum((getattr(m.logprobs, name) for m in mine), []) == getattr(wanted.logprobs, name)


def test_logprobs_of_a_chat(client):
  choice = chat(client, logprobs=True, top_logprobs=3, extra_body=EXTRA).choices[0]
  content = choice.logprobs.content
  assert [e.logprob for e in content] == choice.token_logprobs
  assert b"".join(bytes(e.bytes) for e in content).decode(errors="replace") == (
    T.decode(choice.token_ids)
  )
  for entry in content:
    best = [top.logprob for top in entry.top_logprobs]
    assert len(best) == 3 and best == sorted(best, reverse=True) and best[0] >= entry.logprob
    assert entry.token.startswith("bytes:") or entry.token.encode() == bytes(entry.bytes)
  assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_logprobs_of_a_completion(client):
  choice = complete(client, "abc", logprobs=2, extra_body=EXTRA).choices[0]
  found = choice.logprobs
  assert found.token_logprobs == choice.token_logprobs
  assert len(found.tokens) == len(found.text_offset) == len(choice.token_ids)
  assert all(1 <= len(top) <= 2 for top in found.top_logprobs)
  whole = T.decode(choice.token_ids)
  for name, at in zip(found.tokens, found.text_offset, strict=True):
    assert name.startswith("bytes:") or whole[at:].startswith(name)
  assert complete(client, "abc", logprobs=0).choices[0].logprobs.top_logprobs is None


def test_seeds(client):
  def ids(**arguments):
    answer = complete(client, "abc", extra_body={**EXTRA, "ignore_eos": True}, **arguments)
    return [tuple(c.token_ids) for c in answer.choices]

  four = ids(seed=7, n=4)
  assert len(set(four)) == 4
  assert ids(seed=7, n=2) == four[:2] and ids(seed=7) == four[:1]
  others = [ids(seed=seed)[0] for seed in (8, -1, -(2**63), 2**63 - 1, 2**64 - 1)]
  assert len({*others, four[0]}) == 6
  assert ids(seed=None) != ids(seed=None)


def test_greedy_is_the_most_probable(client):
  for answer in (
    chat(client, temperature=0, seed=s, logprobs=True, top_logprobs=1) for s in (1, 2)
  ):
    for entry in answer.choices[0].logprobs.content:
      assert entry.top_logprobs[0].logprob == entry.logprob


@pytest.mark.parametrize(
  "settings, most",
  [
    ({"extra_body": {"top_k": 1}}, 1),
    ({"extra_body": {"top_k": 3}}, 3),
    ({"extra_body": {"top_k": 10**30}}, 20),
    ({"top_p": 1e-6}, 1),
    ({"top_p": 5e-324}, 1),
    ({"extra_body": {"min_p": 1.0}}, 1),
  ],
)
def test_filters(client, settings, most):
  content = chat(client, logprobs=True, top_logprobs=20, **settings).choices[0].logprobs.content
  for entry in content:
    kept = [top for top in entry.top_logprobs if top.logprob > -9999]
    assert len(kept) == most
    assert most == 20 or sum(math.exp(top.logprob) for top in kept) == pytest.approx(1)


def test_a_bias_decides(client):
  answer = complete(client, "abc", max_tokens=5, logit_bias={"120": 100}, temperature=0.5)
  assert answer.choices[0].text == "xxxxx"
  banned = {str(i): -100 for i in range(264) if i not in (65, 66)}
  text = complete(client, "abc", logit_bias=banned, max_tokens=50).choices[0].text
  assert set(text) == {"A", "B"}


def test_stop_strings(client):
  banned = {str(i): -100 for i in range(264) if i not in (65, 66)}  # only A and B are left
  free = complete(client, "q", logit_bias=banned, max_tokens=60).choices[0].text
  for stop in ("AB", ["zzz", "AB"]):
    for stream in (False, True):
      answer = complete(
        client, "q", logit_bias=banned, max_tokens=60, stop=stop, extra_body=EXTRA, stream=stream
      )
      pieces = list(answer) if stream else [answer]
      assert "".join(p.choices[0].text for p in pieces) == free[: free.index("AB")]
      assert pieces[-1].choices[0].finish_reason == "stop"
      ids = sum((p.choices[0].token_ids for p in pieces), [])
      assert T.decode(ids) == free[: free.index("AB") + 2]


def test_stop_tokens(client):
  bias = {"logit_bias": {"263": 100}}  # <|end|>
  first = chat(client, **bias, extra_body=EXTRA).choices[0]
  assert (first.token_ids, first.message.content, first.finish_reason) == ([263], "", "stop")
  on = chat(client, **bias, max_tokens=4, extra_body={**EXTRA, "ignore_eos": True}).choices[0]
  assert on.token_ids == [263] * 4 and on.finish_reason == "length"
  own = {**EXTRA, "stop_token_ids": [120]}
  choice = complete(client, "a", logit_bias={"120": 100}, extra_body=own).choices[0]
  assert (choice.token_ids, choice.text, choice.finish_reason) == ([120], "", "stop")


def test_by_default_a_reply_may_fill_the_context(client):
  answer = complete(client, "abc", max_tokens=None, logit_bias={"120": 100})
  assert answer.usage.total_tokens == 1024 and answer.choices[0].finish_reason == "length"
  answer = chat(client, max_tokens=None, max_completion_tokens=3, logit_bias={"120": 100})
  assert answer.choices[0].message.content == "xxx"


def test_a_chat_of_ids_is_the_same_chat(client):
  ids = render_prompt(T, "", "hi")
  given = client.chat.completions.create(
    model="micro",
    messages=None,
    max_tokens=24,
    seed=1,
    extra_body={**EXTRA, "prompt_token_ids": ids},
  )
  assert given.choices[0].token_ids == chat(client, extra_body=EXTRA).choices[0].token_ids
  assert given.prompt_token_ids == ids


def test_a_conversation_with_tools_comes_back(client):
  """What a client appends to its messages: the answer's own message, and the tool's."""
  tool = {"type": "function", "function": {"name": "sh", "parameters": {"type": "object"}}}
  first = chat(client, tools=[tool], tool_choice="auto")
  call = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "sh", "arguments": '{"command": "ls"}'},
  }
  messages = [
    *HI,
    first.choices[0].message,
    {"role": "assistant", "content": None, "tool_calls": [call]},
    {"role": "tool", "tool_call_id": "call_1", "content": "a"},
  ]
  answer = chat(client, messages, tools=[tool], parallel_tool_calls=True, extra_body=EXTRA)
  text = T.decode(answer.prompt_token_ids)
  assert '"command": "ls"' in text and "<|tool|>a<|end|>" in text


def test_values_that_ask_for_nothing_are_accepted(client):
  chat(
    client,
    frequency_penalty=0,
    presence_penalty=0.0,
    response_format={"type": "text"},
    store=False,
    service_tier="auto",
    modalities=["text"],
    logit_bias={},
    stop=None,
    user="somebody",
    tools=None,
    stream=False,
  )
  complete(client, "a", best_of=1, echo=False, suffix=None)


def test_models(client):
  (model,) = client.models.list().data
  assert (model.id, model.object, model.owned_by) == ("micro", "model", "rome")
  assert client.models.retrieve("micro").max_model_len == 1024


def test_events_end_as_the_api_says(micro):
  body = {"model": "micro", "prompt": "a", "max_tokens": 3, "stream": True, "seed": 1}
  with micro.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.iter_lines() if line]
  assert lines[-1] == "data: [DONE]"
  assert all(json.loads(line.removeprefix("data: "))["choices"] for line in lines[:-1])


def test_metrics(micro, client):
  before = micro.gauge("sampled_tokens")
  chat(client, max_tokens=9, extra_body={"ignore_eos": True})
  assert micro.gauge("sampled_tokens") == before + 9
  assert micro.gauge("running") == micro.gauge("waiting") == 0
  assert micro.gauge("pages_total") > 0 and 0 <= micro.gauge("cached_share") <= 1
  with micro.http() as http:
    text = http.get("/metrics").text
  assert 'rome_requests_total{method="POST",route="/v1/chat/completions",status="200"}' in text
  for name in ("time_to_first_token", "inter_token"):
    assert f"rome_serve_{name}_seconds_bucket" in text
  assert 'rome_serve_replies_total{finish="length"}' in text
