"""Models: bytes sent, replies whole and in pieces, endpoints that misbehave; scripts."""

import gzip
import json
import socket

import pytest

from rome.agent import openai_model
from rome.agent.context import Context
from rome.agent.model import ModelError, ModelRequest, ModelSettings
from rome.agent.openai_model import OpenAIModel
from rome.agent.scripted import ScriptedModel
from tests.agent.raw_server import DONE, chunk, events, http, serving, whole

TOOL = {"type": "function", "function": {"name": "shell", "parameters": {"type": "object"}}}
REQUEST = ModelRequest(
  [{"role": "user", "content": 'Grüße \u202e "x" \ud800'}], [TOOL], ModelSettings("m", 50, 0.5)
)
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
  monkeypatch.setattr(openai_model, "_BACKOFF", 0.01)


def streamed(*parts, **more):
  return events(
    chunk({"role": "assistant", "content": ""}),
    *parts,
    chunk({}, "stop"),
    chunk({}, usage=USAGE),
    DONE,
    **more,
  )


def ask(url, shown=None, **options):
  model = OpenAIModel(url, "secret", shown, timeout=5, **options)
  try:
    return model.complete(REQUEST)
  finally:
    model.close()


def said(usage=None, **message):
  """A whole reply with such a message."""
  choice = {"index": 0, "message": message, "finish_reason": "stop"}
  return http(json.dumps({"choices": [choice], "usage": usage}).encode())


def test_the_bytes_that_are_sent_are_the_requests():
  with serving(whole("hi"), streamed(chunk({"content": "hi"}))) as server:
    assert ask(server.url).content == "hi"
    ask(server.url, lambda kind, text: None)
  wire = REQUEST.wire()
  assert server.bodies[0] == wire
  assert server.bodies[1] == wire[:-1] + b',"stream":true,"stream_options":{"include_usage":true}}'
  assert json.loads(server.bodies[1])["stream"] is True


def test_a_reply_in_pieces_is_the_reply_that_came_whole():
  told = []
  call = {
    "index": 0,
    "id": "c0",
    "type": "function",
    "function": {"name": "shell", "arguments": ""},
  }
  pieces = ['{"comm', 'and": "ls"}']
  parts = [
    chunk({"content": "I "}),
    chunk({"content": "look."}),
    chunk({"tool_calls": [call]}),
    *(chunk({"tool_calls": [{"index": 0, "function": {"arguments": p}}]}) for p in pieces),
  ]
  with serving(streamed(*parts), whole("I look.", ("shell", "".join(pieces)))) as server:
    first = ask(server.url, lambda kind, text: told.append((kind, text)))
    second = ask(server.url)
  assert first.calls == second.calls and first.calls[0].arguments == '{"command": "ls"}'
  assert (first.content, first.prompt_tokens, first.completion_tokens) == ("I look.", 7, 3)
  assert (second.content, second.prompt_tokens, second.completion_tokens) == ("I look.", 7, 3)
  texts = [text for kind, text in told if kind == "text"]
  assert texts == ["I ", "look."] and "".join(t for k, t in told if k == "call").startswith("shell")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_thinking_beside_the_content_goes_back_by_its_name(name):
  told = []
  both = {"reasoning": "So it is.", "reasoning_content": "So it is."}
  pieces = [chunk({name: "So "}), chunk({name: "it is."}), chunk({"content": "Hi"})]
  plain = said(content="Hi", **{name: "So it is."})
  with serving(streamed(*pieces), plain, said(**both)) as server:
    first = ask(server.url, lambda kind, text: told.append((kind, text)))
    second = ask(server.url)
    assert ask(server.url).reasoning == {"reasoning": "So it is."}
  assert first.reasoning == second.reasoning == {name: "So it is."}
  assert told == [("thinking", "So "), ("thinking", "it is."), ("text", "Hi")]
  context = Context(ModelSettings("m", 50), [], 1000)
  context.begin([{"role": "user", "content": "hi"}])
  context.reply(first)
  assert context.messages[-1] == {"role": "assistant", "content": "Hi", name: "So it is."}


@pytest.mark.parametrize("shown", [None, lambda kind, text: None])
def test_what_fails_on_the_way_is_tried_again(shown):
  good = streamed(chunk({"content": "hi"})) if shown else whole("hi")
  busy = http(b'{"error": {"message": "slow down"}}', status="429 Too Many Requests")
  with serving(busy, http(b"", status="503 Service Unavailable"), good) as server:
    assert ask(server.url, shown).content == "hi"
  assert len(server.bodies) == 3 and len(set(server.bodies)) == 1


def test_half_a_stream_is_asked_for_again_and_what_was_shown_is_taken_back():
  told = []
  half = events(chunk({"content": "ha"}), more=100)
  cut = events(chunk({"content": "ha"}), DONE)
  failed = events(chunk({"content": "ha"}), chunk({}, "error"), DONE)
  with serving(half, cut, failed, streamed(chunk({"content": "whole"}))) as server:
    reply = ask(server.url, lambda kind, text: told.append((kind, text)))
  assert reply.content == "whole"
  assert [text or kind for kind, text in told] == ["ha", "again"] * 3 + ["whole"]


@pytest.mark.parametrize(
  ("answer", "says"),
  [
    (http(b"<html>no</html>", "text/html"), "no chat completion"),
    (http(b"{}"), "no chat completion"),
    (http(b"\xff\xfe\x00garbage"), "no chat completion"),
    (http(b'{"choices": []}'), "no chat completion"),
    (http(b'{"error": {"message": "bad key"}}', status="401 Unauthorized"), "set the key"),
    (http(b'{"error": {"message": "no such model"}}', status="404 Not Found"), "check --endpoint"),
    (http(b"oops", status="500 Internal Server Error"), "no reply in 2 attempts"),
    (http(b"", more=50), "no reply in 2 attempts"),
    (http(whole("").partition(b"\r\n\r\n")[2].replace(b'"stop"', b'"error"')), "in the middle"),
    (http(b"[" * 100_000), "no chat completion"),
    (said(content=[1]), "a text of its reply is none"),
    (said(tool_calls=[{"id": "a", "function": {"name": "f", "arguments": {"a": 1}}}]), "a text"),
    (said(tool_calls=[{"id": "a", "function": {"name": None, "arguments": "{}"}}]), "a text"),
    (said({"prompt_tokens": "5", "completion_tokens": 1}, content="x"), "counts of tokens"),
    (
      http(gzip.compress(b" " * (64 << 20))).replace(b"\r\n", b"\r\nContent-Encoding: gzip\r\n", 1),
      "encoded, 'gzip', which was not asked for",
    ),
  ],
)
def test_what_is_no_reply_is_one_clear_error(answer, says):
  with serving(answer) as server, pytest.raises(ModelError, match=says) as error:
    ask(server.url, tries=2)
  assert "\n" not in str(error.value) and server.url in str(error.value)


@pytest.mark.parametrize(
  "answer",
  [
    events(b"data: {not json}\n\n", DONE),
    events(b"\xff\xfe\x00\n\n"),
    events(b'data: {"choices": 3}\n\n', DONE),
    events(chunk({"content": "half"})),
    events(b'data: {"error": {"message": "out of memory"}}\n\n'),
    http(b"<html>", "text/html"),
  ],
)
def test_a_stream_of_garbage_is_one_clear_error(answer):
  with serving(answer) as server, pytest.raises(ModelError) as error:
    ask(server.url, lambda kind, text: None, tries=2)
  assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_reply_has_a_bound():
  line = b'data: {"choices": [{"delta": {"content": "' + b"x" * (10 << 20)
  with serving(events(line)) as server, pytest.raises(ModelError, match="8 MiB"):
    ask(server.url, lambda kind, text: None, tries=1)
  with serving(http(b" " * (10 << 20))) as server, pytest.raises(ModelError, match="8 MiB"):
    ask(server.url, tries=1)


def test_nobody_at_the_address():
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
  with pytest.raises(ModelError, match="is it up"):
    ask(f"http://127.0.0.1:{port}/v1", tries=2)
  with pytest.raises(ModelError, match="must begin with http"):
    OpenAIModel("localhost:8000")


def request(*contents):
  roles = ["user", "assistant"] * len(contents)
  messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
  return ModelRequest(messages, [], ModelSettings("m", 50))


def script(tmp_path, text):
  path = tmp_path / "script.yaml"
  path.write_text(text)
  return ScriptedModel.load(str(path))


def test_replies_in_turn(tmp_path):
  model = script(tmp_path, "- text: one\n  calls: [{shell: {command: ls}}]\n- text: two\n")
  first = model.complete(request("go"))
  assert first.content == "one" and first.calls[0].arguments == '{"command": "ls"}'
  assert model.complete(request("go", "one", "x")).content == "two"
  with pytest.raises(ModelError, match="has 2 replies"):
    model.complete(request("go", "one", "x", "two", "y"))


def test_rules_see_the_last_message(tmp_path):
  model = script(
    tmp_path,
    r"""
rules:
- when: fix (\w+)
  calls: [{shell: {command: "cat \\1"}}]
- {when: error, once: true, text: It fails.}
- text: Done.
""",
  )
  assert model.complete(request("fix it")).calls[0].arguments == '{"command": "cat it"}'
  assert model.complete(request("error")).content == "It fails."
  assert model.complete(request("error")).content == "Done."


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ("{", "cannot be read"),
    ("3", "must be a list"),
    ("- hello", "entry 1 must be a mapping"),
    ("- {txt: x}", "entry 1 must be a mapping"),
    ("- {calls: [{a: 1, b: 2}]}", "one name and its arguments"),
    ('rules: [{when: "("}]', "entry 1"),
    ("rules: [{when: x}]", "no rule"),
  ],
)
def test_a_script_that_is_none(tmp_path, text, says):
  with pytest.raises(ModelError, match=says):
    script(tmp_path, text).complete(request("y"))
