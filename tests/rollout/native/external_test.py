"""Another server in the policy's place: what reaches it, comes back, is kept, and fails."""

import asyncio
import base64
import contextlib
import hashlib
import http.server
import json
import math
import pathlib
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import uvicorn

from experiments import runner
from experiments.configs import native as native_config
from rome import models
from rome.envs import generate
from rome.envs.service.auth import Tenant, Tokens
from rome.envs.service.sockets import listen
from rome.rollout import TasksConfig, TaskSource, openai_http, policy_tokenizer
from rome.rollout.groups import Member
from rome.rollout.native import NativeConfig, Proxy, Sessions, Terms
from rome.rollout.native.endpoint import Endpoint
from rome.rollout.native.external import ExternalSession, external_calls
from rome.rollout.recorder import Episode
from rome.rollout.serve import app, core, load
from rome.text.render import Renderer
from rome.trajectory import Valid
from tests.rollout.native.policies import spoken, taught

KEY = "the-real-key-of-the-endpoint"
MAX_CALLS = 4
JSON = {"Content-Type": "application/json"}
HI = [{"role": "user", "content": "hi"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "sh", "arguments": "{}"}}
REPLY = {
  "id": "chatcmpl-7",
  "object": "chat.completion",
  "created": 5,
  "model": "big-2026",
  "service_tier": "default",
  "choices": [
    {
      "index": 0,
      "message": {"role": "assistant", "content": "I look", "tool_calls": [CALL], "extra": []},
      "finish_reason": "tool_calls",
    }
  ],
  "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}


class Upstream(http.server.BaseHTTPRequestHandler):
  """A server of the API that says what it was told to, and keeps what it was asked."""

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    self.server.asked.append((self.path, self.headers["Authorization"], body))
    self.server.go.wait(20)
    status, answer = self.server.answer
    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    self.send_response(status)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    with contextlib.suppress(BrokenPipeError):
      self.wfile.write(data)

  def log_message(self, *_):
    pass


@pytest.fixture
def upstream(monkeypatch):
  monkeypatch.setattr(openai_http, "_FIRST_PAUSE", 0.01)
  monkeypatch.setenv("MY_KEY", KEY)
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
  server.answer, server.asked, server.go = (200, REPLY), [], threading.Event()
  server.go.set()
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  yield server
  server.go.set()
  server.shutdown()
  thread.join()
  server.server_close()


@contextlib.contextmanager
def open_session(url, silence=20.0):
  """A session and a client with its key, at a proxy before `url`."""
  endpoint = Endpoint(NativeConfig(endpoint=url, api_key_variable="MY_KEY", silence=silence))
  terms = Terms(Renderer(policy_tokenizer()), (), models.Sampling(), 8, 64, MAX_CALLS)
  sessions = Sessions(terms, lambda *of: ExternalSession(endpoint, *of))
  with Proxy(sessions, "big", external_calls) as proxy:
    session = sessions.open(Member(0, 0))
    with openai.OpenAI(base_url=proxy.url, api_key=session.key, max_retries=0) as client:
      yield session, client
  endpoint.close()


@pytest.fixture
def at(upstream):
  with open_session(f"http://127.0.0.1:{upstream.server_port}/v1/") as found:
    yield found


def chat(client, messages=HI, **fields):
  return client.chat.completions.create(model="big", messages=messages, **fields)


def kept(session):
  episode = Episode("t#0", generate("count", 0), Member(0, 0))
  return session.record.finish(episode, None, Valid(1.0), "submitted")


def test_everything_goes_through_with_the_hosts_key(at, upstream):
  session, client = at
  said = {"temperature": 0.3, "seed": 7, "n": 1, "stop": ["x"], "max_tokens": 9000}
  extra = {"response_format": {"type": "json_object"}, "vendor": {"of": [1, None]}}
  long = [{"role": "user", "content": [{"type": "text", "text": "x" * 5000}]}]
  answer = chat(client, long, **said, extra_body=extra)
  ((path, authorization, body),) = upstream.asked
  assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
  assert body == {"model": "big", "messages": long, **said, **extra}
  assert answer.to_dict() == REPLY
  assert [m.id for m in client.models.list()] == ["big"]


def test_hostile_bodies(at, upstream):
  """Half a surrogate pair, no number, and depth: they arrive or are refused, nothing breaks."""
  session, client = at
  url, headers = f"{client.base_url}chat/completions", {"Authorization": f"Bearer {session.key}"}

  def post(text):
    data = f'{{"model": "big", "messages": [], "x": {text}}}'.encode()
    return httpx.post(url, content=data, headers=headers | JSON, trust_env=False)

  assert post('"\\ud800"').status_code == 200 and upstream.asked[-1][2]["x"] == "\ud800"
  assert post("NaN").status_code in (200, 400)
  for depth in (500, 900, 3000, 100_000):
    assert post("[" * depth + "]" * depth).status_code in (200, 400)
  assert not session.failure


def test_one_call_is_sent_once_streams_too(at, upstream):
  session, client = at
  upstream.go.clear()
  answers = []
  threads = [threading.Thread(target=lambda: answers.append(chat(client))) for _ in range(3)]
  for thread in threads:
    thread.start()
  while not upstream.asked:
    pass
  assert session.silence() == 0  # under way
  upstream.go.set()
  for thread in threads:
    thread.join()
  chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
  (_, _, body), *others = upstream.asked
  assert not others and "stream" not in body and session.record.calls == 1
  assert [a.to_dict() for a in answers] == [REPLY] * 3
  first, last, usage = chunks
  assert first.choices[0].delta.content == "I look" and first.service_tier == "default"
  assert first.choices[0].delta.tool_calls[0].function.name == "sh"
  assert last.choices[0].finish_reason == "tool_calls" and usage.usage.total_tokens == 5


def test_the_record_is_text_and_nothing_to_train_on(at, upstream):
  session, client = at
  chat(client)
  tool = {"role": "tool", "tool_call_id": "c1", "content": "a.txt"}
  odd = {"role": "user", "content": {"not": "known"}, "tool_calls": "no list"}
  reply = REPLY["choices"][0]["message"]
  chat(client, [*HI, reply, tool, odd])
  t = kept(session)
  assert t.turns[0].action == f"I look\n{json.dumps([CALL])}"
  assert t.turns[0].observation == 'a.txt\n{"not": "known"}\n"no list"'
  assert t.turns[1].observation == ""
  assert t.num_chunks == 2 and (t.versions == -1).all() and t.success
  assert len(t.tokens) == len(t.call_ids) == len(t.logps) == 0


def test_one_call_too_many(at, upstream):
  session, client = at
  for n in range(MAX_CALLS):
    chat(client, [{"role": "user", "content": str(n)}])
  with pytest.raises(openai.PermissionDeniedError, match="has had its 4 calls"):
    chat(client)
  assert session.stopped == "max_turns" and len(upstream.asked) == MAX_CALLS


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_with_a_request_is_the_agents(at, upstream, stream):
  session, client = at
  error = {"message": "too long", "type": "x", "param": None, "code": "context_length_exceeded"}
  upstream.answer = (400, {"error": error})
  for _ in range(2):
    with pytest.raises(openai.BadRequestError) as found:
      chat(client, stream=stream)
    assert found.value.body == error
  assert len(upstream.asked) == 1 and session.overflowed and not session.failure
  assert kept(session).turns == ()
  upstream.answer = (200, REPLY)
  chat(client, [{"role": "user", "content": "shorter"}])
  assert not session.overflowed and len(kept(session).turns) == 1
  with pytest.raises(openai.BadRequestError, match="messages must be a list of objects"):
    chat(client, ["hi"])


@pytest.mark.parametrize(
  "status, answer, tries, message",
  [
    (401, f"no such key: {KEY}", 1, r"401: .*\*\*\*.*native.api_key_variable=MY_KEY\?"),
    (401, "x" * 490 + KEY, 1, "401: x"),  # cut in the middle of the key
    (404, {"error": {"message": "no model"}}, 1, "404: .*no model.*native.model"),
    (402, {"error": {"message": "no credit"}}, 1, "402: .*no credit"),
    (503, {"error": {"message": "full"}}, 5, "503: .*full"),
    (200, {"choices": []}, 1, "no chat completion"),
    (200, {"choices": [{"message": {"tool_calls": [7]}}]}, 1, "no chat completion"),
    (200, {"choices": [{"message": {}, "finish_reason": "error"}]}, 1, "no chat completion"),
    (200, {"choices": [{"message": {}, "error": {"code": 502}}]}, 1, "no chat completion: .*502"),
    (200, {"choices": [{"message": {}, "logprobs": -math.inf}]}, 1, "no chat completion"),
    (200, {"choices": [], "you": "x" * 465 + KEY}, 1, "no chat completion"),
    (200, b"<html>", 1, "not JSON: <html>"),
  ],
)
def test_what_else_is_no_reply_is_one_502(at, upstream, status, answer, tries, message):
  session, client = at
  upstream.answer = (status, answer.encode() if isinstance(answer, str) else answer)
  url = f"native.endpoint=http://127.0.0.1:{upstream.server_port}/v1/ gives no reply"
  for _ in range(2):  # the second is not sent any more
    with pytest.raises(openai.InternalServerError, match=f"{url} .*{message}") as found:
      chat(client)
    assert found.value.status_code == 502 and KEY[:8] not in found.value.message
  assert len(upstream.asked) == tries
  assert session.stopped == "endpoint_failed" and url in session.failure


def test_a_refusal_does_not_tell_the_key(at, upstream):
  upstream.answer = (400, {"error": {"message": f"sent with {KEY}"}})
  with pytest.raises(openai.BadRequestError, match=r"sent with \*\*\*"):
    chat(at[1])


def test_a_key_that_cannot_be_sent_is_not_told(upstream, monkeypatch):
  monkeypatch.setenv("MY_KEY", f"{KEY}\nsecond")
  with open_session(f"http://127.0.0.1:{upstream.server_port}/v1") as (session, client):
    with pytest.raises(openai.InternalServerError, match="line break in the API key") as found:
      chat(client)
    assert KEY not in found.value.message and KEY not in session.failure and not upstream.asked


def test_there_is_one_model(at, upstream):
  """Not another one of the endpoint's, with the host's key, under this one's name in the result."""
  session, client = at
  upstream.answer = (404, {"error": {"message": "no such model"}})
  for name in ("bigger", None, 7):
    with pytest.raises(openai.NotFoundError, match="there is no model .*, only 'big'"):
      client.chat.completions.create(model=name, messages=HI)
  assert not upstream.asked and not session.failure and not session.stopped


def test_an_endpoint_that_hangs_has_failed(upstream):
  upstream.go.clear()
  url = f"http://127.0.0.1:{upstream.server_port}/v1"
  with open_session(url, silence=0.3) as (session, client):
    with pytest.raises(openai.InternalServerError, match="ReadTimeout.*native.silence=0.3 s"):
      chat(client)
    assert len(upstream.asked) == 1 and session.failure


def test_an_episode_that_is_dropped_leaves_nothing_behind(upstream, caplog):
  """Who still waits is told at once, and the proxy closes without a word."""
  upstream.go.clear()
  with open_session(f"http://127.0.0.1:{upstream.server_port}/v1") as (session, client):
    with ThreadPoolExecutor() as pool:
      waiting = [pool.submit(chat, client, stream=stream) for stream in (False, True)]
      while not upstream.asked:
        pass
      session.drop()
      for call in waiting:
        with pytest.raises((openai.InternalServerError, openai.AuthenticationError)):
          call.result(timeout=5)
    assert session.settle(5) and not session.failure
  assert not caplog.records


# --- in sandboxes, by experiments.evaluate -------------------------------------------------------

AGENT = (pathlib.Path(__file__).parent / "curl.sh").read_text() + r"""
body() {
  echo "{\"model\": \"$OPENAI_MODEL\", \"temperature\": 0, \"max_tokens\": $1,
    \"messages\": [{\"role\": \"user\", \"content\": \"$2\"}]}"
}
reply=$(ask "$(body 60 "$ROME_INSTRUCTION")")
eval "$(sed -n 's/.*"content": *"\([^"]*\)".*/\1/p' <<<"$reply")"
ask "$(body 1 "$(env | base64 -w0)")"
[[ $reply == *" 200 "* ]] && ! (exec 4<>"/dev/tcp/$endpoint")
"""


@pytest.fixture(scope="module")
def served():
  """`rome serve` in a thread, with a policy that knows one task."""
  task = TaskSource(TasksConfig(families=("count",))).get("held_out", 0)
  opening = [{"role": "user", "content": task.instruction}]
  params, loss = taught(
    models.PRESETS["micro"],
    [spoken(opening, ["wc -l < hare.txt > ans"], [], [])],
    steps=60,
    rate=2e-2,
  )
  assert loss < 0.05
  prepared = load.prepare(load.LoadConfig(model="micro", slots=2, max_length=2048))
  tokens = Tokens([(hashlib.sha256(KEY.encode()).digest(), Tenant("key"))])
  service = core.Service(prepared, tokens, core.ServeConfig())
  listener = listen("127.0.0.1", 0)
  server = uvicorn.Server(uvicorn.Config(app.create_app(service), log_config=None, lifespan="off"))

  async def serve():
    await service.loop.start()
    await service.loop.publish(params, 1)
    await server.serve([listener])
    await service.close()

  thread = threading.Thread(target=lambda: asyncio.run(serve()))
  thread.start()
  yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
  server.should_exit = True
  thread.join()


def settings(**changes):
  config = native_config.get_config()
  config.update_from_flattened_dict(
    {
      "tasks.families": ("count",),
      "sandbox.backend": "bubblewrap",
      "sandbox.image": "",
      "native.install": "",
      "native.command": AGENT,
      "native.model": "micro",
      "engine.slots": 2,
      "eval.instances": 2,
      "transcripts": 2,
      **changes,
    }
  )
  return config


@pytest.mark.slow
def test_an_agent_is_measured_with_another_server(served, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  workdir = tmp_path / "new"
  host, port = served.split("/")[2].split(":")
  command = f"endpoint={host}/{port}\n{AGENT}"  # which it must not reach by itself
  config = settings(**{"native.endpoint": served, "native.command": command})
  assert runner.evaluate(config, workdir) == 0, capsys.readouterr().err
  result = json.loads((workdir / "evaluation.json").read_text())
  assert (result["success"], result["n"], result["endpoint"]) == (1.0, 2, served)
  assert result["interval"][0] > 0.3 and result["model"] == "micro"
  rows = [json.loads(x) for x in (workdir / "evaluation_episodes.jsonl").read_text().splitlines()]
  assert [row["end_reason"] for row in rows] == ["submitted"] * 2
  keys = set()
  for row in rows:
    first, second = row["turns"]
    assert first["action"] == "wc -l < hare.txt > ans" and len(second["action"]) <= 1
    environ = base64.b64decode(first["observation"]).decode()
    assert KEY not in environ and served not in environ
    keys.add(dict(line.split("=", 1) for line in environ.splitlines())["OPENAI_API_KEY"])
  assert len(keys) == 2 and all(key.startswith("rome-") for key in keys)


@pytest.mark.slow
def test_an_endpoint_that_is_down_ends_the_evaluation(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(openai_http, "_FIRST_PAUSE", 0.01)
  with listen("127.0.0.1", 0) as listener:
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
  config = settings(**{"native.endpoint": url, "sandbox.invalid_cap": 0.0})
  assert runner.evaluate(config, tmp_path) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: 1 episodes of a batch failed for reasons of infrastructure")
  assert f"native.endpoint={url} gives no reply" in line and "ConnectError" in line
  assert not (tmp_path / "evaluation.json").exists()


def test_it_is_refused_in_training(tmp_path, capsys):
  url = "http://127.0.0.1:9/v1"
  assert runner.train(settings(**{"native.endpoint": url}), tmp_path / "run") == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"error: config.native.endpoint must be '' for training, got '{url}'")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "url", ["127.0.0.1:8000", "ftp://host/v1", "http:///v1", "http://u:p@host/v1", "http://h:x/v1"]
)
def test_an_endpoint_is_a_url(url):
  with pytest.raises(ValueError, match="native.endpoint must be a URL of http or https"):
    NativeConfig(endpoint=url)
