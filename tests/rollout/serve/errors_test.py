"""Bad input is a 4xx in the API's envelope that names what is wrong, and the engine is unharmed."""

import json
import subprocess

import openai
import pytest

from tests.rollout.serve.conftest import KEY

pytestmark = pytest.mark.slow

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "sh"}}
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BASE = {
  CHAT: {"model": "micro", "messages": HI, "max_tokens": 2},
  COMPLETION: {"model": "micro", "prompt": "a", "max_tokens": 2},
}
LONG = [1] * 1024


@pytest.fixture(autouse=True)
def unharmed(micro):
  """After every one of these the server serves."""
  yield
  with micro.http() as http:
    assert http.post(COMPLETION, json=BASE[COMPLETION]).status_code == 200
    assert http.get("/health").json() == {"status": "ok", "version": 0}


def refused(response, status=400):
  """The error of an answer, after a look at its shape."""
  assert response.status_code == status, response.text
  assert response.headers["content-type"] == "application/json"
  body = response.json()
  assert list(body) == ["error"]
  assert list(body["error"]) == ["message", "type", "param", "code"]
  assert body["error"]["message"] and body["error"]["type"]
  return body["error"]


# Field, value, the param of the error (None: the field's name).
EVERYWHERE = [
  ("temperature", 2.1, None),
  ("temperature", -0.1, None),
  ("temperature", "1", None),
  ("temperature", True, None),
  ("top_p", 0, None),
  ("top_p", 1.5, None),
  ("top_k", -2, None),
  ("top_k", 1.5, None),
  ("min_p", 1.1, None),
  ("n", 0, None),
  ("n", 129, None),
  ("n", 1.5, None),
  ("max_tokens", 0, None),
  ("max_tokens", -5, None),
  ("max_tokens", 10**30, None),
  ("seed", 2**64, None),
  ("seed", "7", None),
  ("stop", "", None),
  ("stop", ["a", ""], None),
  ("stop", list("abcde"), None),
  ("stop", 7, None),
  ("stop", {"a": 1}, None),
  ("stop_token_ids", [264], None),
  ("stop_token_ids", [-1], None),
  ("stop_token_ids", list(range(9)), None),
  ("stop_token_ids", ["a"], None),
  ("logit_bias", {"264": 1}, None),
  ("logit_bias", {"a": 1}, None),
  ("logit_bias", {"1": 101}, None),
  ("logit_bias", {"1": 1, "01": 2}, None),
  ("logit_bias", {str(i): 1 for i in range(301)}, None),
  ("logit_bias", [1], None),
  ("stream", "yes", None),
  ("stream_options", {"include_usage": True}, None),
  ("user", 7, None),
  ("user", "x" * 513, None),
  ("model", 7, None),
  ("frequency_penalty", 0.5, None),
  ("presence_penalty", -1, None),
  ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}, None),
  ("response_format", {"type": "json_object"}, None),
  ("echo", True, None),
  ("best_of", 2, None),
  ("suffix", "x", None),
  ("audio", {"voice": "x", "format": "wav"}, None),
  ("modalities", ["text", "audio"], None),
  ("store", True, None),
  ("metadata", {"a": "b"}, None),
  ("reasoning_effort", "low", None),
  ("service_tier", "flex", None),
  ("web_search_options", {}, None),
  ("parallel_tool_calls", False, None),
  ("functions", [{"name": "x"}], None),
  ("temprature", 1, None),
  ("x" * 5000, 1, "x" * 200),
  ("guided_json", {}, None),
]
OF_CHATS = [
  ("messages", [], None),
  ("messages", None, None),
  ("messages", "hi", None),
  ("messages", [[]], None),
  ("messages", [{"role": "user"}], None),
  ("messages", [{"role": "robot", "content": "x"}], None),
  ("messages", [{"content": "x"}], None),
  ("messages", [{"role": "user", "content": None}], None),
  ("messages", [{"role": "user", "content": 7}], None),
  ("messages", [{"role": "user", "content": []}], None),
  ("messages", [{"role": "user", "content": "x", "mood": "good"}], None),
  ("messages", [{"role": "user", "content": "x" * 1100}], None),
  ("messages", [{"role": "user", "content": "x" * 1000_000}], None),
  (
    "messages",
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    None,
  ),
  ("messages", [{"role": "assistant", "tool_calls": [{"id": "x", "function": {}}]}], None),
  ("prompt_token_ids", [1], "messages"),
  ("logprobs", 3, None),
  ("top_logprobs", 3, None),
  ("max_completion_tokens", 3, "max_tokens"),
  ("tools", [{"type": "function"}], None),
  ("tools", [{"type": "custom", "custom": {"name": "x"}}], None),
  ("tools", [{"type": "function", "function": {"name": "x", "strict": True}}], None),
  ("tools", {}, None),
  ("tool_choice", "required", None),
  ("tool_choice", {"type": "function", "function": {"name": "sh"}}, None),
  ("tool_choice", 7, None),
  ("chat_template_kwargs", {"messages": []}, None),
  ("prompt", "x", None),
]
OF_COMPLETIONS = [
  ("prompt", None, None),
  ("prompt", "", None),
  ("prompt", [], None),
  ("prompt", [[]], None),
  ("prompt", [""], None),
  ("prompt", ["a", 1], None),
  ("prompt", [1, "a"], None),
  ("prompt", [1.5], None),
  ("prompt", [True], None),
  ("prompt", [-1], None),
  ("prompt", [264], None),
  ("prompt", [10**30], None),
  ("prompt", LONG, None),
  ("prompt", [[1], LONG], None),
  ("prompt", "x" * 5000, None),
  ("prompt", ["a"] * 129, None),
  ("prompt", {"a": 1}, None),
  ("logprobs", 21, None),
  ("logprobs", True, None),
  ("messages", HI, None),
  ("tools", [TOOL], None),
]
CASES = [
  *((path, *case) for path in (CHAT, COMPLETION) for case in EVERYWHERE),
  *((CHAT, *case) for case in OF_CHATS),
  *((COMPLETION, *case) for case in OF_COMPLETIONS),
]


def test_every_bad_field_is_named(micro):
  with micro.http() as http:
    for path, name, value, param in CASES:
      content = json.dumps(BASE[path] | {name: value}).encode()
      response = http.post(path, content=content, headers={"Content-Type": "application/json"})
      error = refused(response)
      assert error["param"] == (param or name), (name, str(value)[:100], error)
      assert error["type"] == "invalid_request_error" and len(error["message"]) < 1500


def test_half_of_a_surrogate_pair_is_a_question_mark(micro):
  """As in the tokenizers: it is no character, but no reason to fail either."""
  content = [{"role": "user", "content": "\ud800"}]
  with micro.http() as http:
    body = json.dumps(BASE[CHAT] | {"messages": content, "return_token_ids": True})
    answer = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
  assert answer.json()["prompt_token_ids"][2] == ord("?")


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_missing_field_is_named(micro, path):
  with micro.http() as http:
    for name in BASE[path].keys() - {"max_tokens"}:
      body = {k: v for k, v in BASE[path].items() if k != name}
      assert refused(http.post(path, json=body))["param"] == name


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400"])
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_numbers_that_are_none(micro, path, value):
  for name in ("temperature", "top_p", "logit_bias"):
    given = value if name != "logit_bias" else '{"1": ' + value + "}"
    text = json.dumps(BASE[path])[:-1] + f', "{name}": {given}}}'
    with micro.http() as http:
      response = http.post(path, content=text, headers={"Content-Type": "application/json"})
    assert refused(response)["param"] == name


@pytest.mark.parametrize(
  "body",
  [
    b"",
    b"{",
    b"[]",
    b"null",
    b"7",
    b'"text"',
    b'{"model": "micro", "prompt": "a", "\\ud800": 1}',
    b"\xff\xfe",
    b"{" + b"'a'" + b"}",
    b'{"model": "micro", "prompt": "a"} {}',
    b'{"model": "micro", "prompt": ' + 100_000 * b"[" + 100_000 * b"]" + b"}",
    b'{"model": "micro", "prompt": ' + 900 * b"[" + 900 * b"]" + b"}",
    b'{"model": "micro", "prompt": ' + 50_000 * b'{"a":' + b"1" + 50_000 * b"}" + b"}",
    b'{"model": "micro", "prompt": "a", "seed": ' + 10_000 * b"9" + b"}",
  ],
)
def test_bodies_that_are_none(micro, body):
  with micro.http() as http:
    refused(http.post(COMPLETION, content=body, headers={"Content-Type": "application/json"}))


def test_a_body_of_another_type_says_what_is_wanted(micro):
  with micro.http() as http:
    response = http.post(COMPLETION, data={"model": "micro"})
  assert "Content-Type: application/json" in refused(response)["message"]


def test_a_large_body_is_refused(micro):
  body = BASE[COMPLETION] | {"prompt": "x" * (10 << 20)}
  with micro.http() as http:
    assert refused(http.post(COMPLETION, json=body), 413)["code"] == "too_large"

    def pieces():
      for _ in range(10):
        yield b"x" * (1 << 20)

    refused(http.post(COMPLETION, content=pieces()), 413)


def test_a_long_prompt_has_the_code_that_clients_know(client):
  with pytest.raises(openai.BadRequestError) as error:
    client.completions.create(model="micro", prompt=LONG, max_tokens=3)
  assert error.value.code == "context_length_exceeded" and error.value.param == "prompt"
  assert "1024 tokens of the prompt and 3 of the reply" in str(error.value)


@pytest.mark.parametrize("name", ["gpt-4", "", "x" * 1000, "micro/"])
def test_another_model(micro, client, name):
  with pytest.raises(openai.NotFoundError) as error:
    client.chat.completions.create(model=name, messages=HI)
  assert error.value.code == "model_not_found" and error.value.param == "model"
  with micro.http() as http:
    assert http.get(f"/v1/models/{name or 'x'}").status_code == 404


def test_paths_and_methods(micro):
  with micro.http() as http:
    refused(http.get("/v1/embeddings"), 404)
    refused(http.post("/v1/responses", json={}), 404)
    response = http.get(CHAT)
    refused(response, 405)
    assert response.headers["allow"] == "POST"


def test_keys(micro):
  for key in (None, "wrong", KEY + "x", KEY[:-1]):
    with micro.http(key) as http:
      for path in (CHAT, COMPLETION):
        response = http.post(path, json=BASE[path])
        assert refused(response, 401)["code"] == "invalid_api_key"
      assert http.get("/v1/models").status_code == http.get("/metrics").status_code == 401
      assert http.get("/health").status_code == 200
  with micro.openai("wrong") as client, pytest.raises(openai.AuthenticationError):
    client.models.list()


def test_with_curl_as_a_person_would(micro):
  def curl(*arguments):
    command = ["curl", "-sS", "--noproxy", "*", "-w", "\n%{http_code}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body)

  url, key = micro.url + COMPLETION, ["-H", f"Authorization: Bearer {KEY}"]
  as_json = ["-H", "Content-Type: application/json"]
  assert curl(url, *as_json, "-d", "{}")[0] == 401
  status, body = curl(url, *key, *as_json, "-d", '{"model": "micro", "prompt": "a",}')
  assert status == 400 and body["error"]["code"] == "invalid_json"
  status, body = curl(url, *key, *as_json, "-d", '{"model": "micro", "prompt": "a", "n": "2"}')
  assert (status, body["error"]["param"]) == (400, "n")
  status, body = curl(url, *key, *as_json, "-d", '{"model":"micro","prompt":"a","max_tokens":2}')
  assert status == 200 and body["usage"]["completion_tokens"] in (1, 2)
