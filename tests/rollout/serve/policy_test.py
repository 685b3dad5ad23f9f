"""The client adapter against a live server: exact ids, log-probs, errors that say what is wrong."""

import dataclasses
import http.server
import json
import threading

import pytest

from rome.models import Sampling
from rome.rollout import openai_http
from rome.rollout.engine import Request
from rome.rollout.openai_policy import OpenAIPolicy, PolicyError
from tests.rollout.serve.conftest import KEY

ASKED = Request(context=(257, 104, 105), max_tokens=12, key=(3, 4))


@pytest.fixture
def policy(micro):
  with OpenAIPolicy(f"{micro.url}/v1", api_key=KEY) as found:
    yield found


@pytest.mark.slow
def test_a_reply_has_the_ids_and_log_probs_of_the_server(policy, client):
  assert (policy.model, policy.processed) == ("micro", True)
  reply = policy.ask(ASKED)
  seed = (3 << 32 | 4) - (1 << 63)
  direct = client.completions.create(
    model="micro",
    prompt=[257, 104, 105],
    max_tokens=12,
    seed=seed,
    logprobs=0,
    extra_body={"return_token_ids": True},
  ).choices[0]
  assert reply.tokens == direct.token_ids and reply.logps == direct.logprobs.token_logprobs
  assert reply.finish == direct.finish_reason and reply.version == 0
  assert policy.ask(ASKED) == dataclasses.replace(reply, cached=2)
  assert policy.ask(dataclasses.replace(ASKED, key=(3, 5))).tokens != reply.tokens


@pytest.mark.slow
def test_every_setting_arrives(policy):
  def ask(**changes):
    return policy.ask(dataclasses.replace(ASKED, **changes))

  assert ask(sampling=Sampling(top_k=1)).logps == pytest.approx([0] * 12)
  assert ask(sampling=Sampling(min_p=1.0)).logps == pytest.approx([0] * 12)
  assert ask(sampling=Sampling(top_p=1e-6)).tokens == ask(greedy=True).tokens
  assert ask(logit_bias=((120, 100.0),)).tokens == [120] * 12
  assert ask(logit_bias=((120, 100.0),), stop_tokens=(120,)).finish == "stop"
  assert ask(logit_bias=((263, 100.0),)).tokens == [263]
  assert ask(logit_bias=((263, 100.0),), stop_tokens=()).tokens == [263] * 12
  stopped = ask(logit_bias=((120, 100.0),), stop_strings=("xxx",), text=True)
  assert (stopped.tokens, stopped.text, stopped.finish) == ([120] * 3, "", "stop")


def test_what_it_cannot_give_is_refused():
  policy = OpenAIPolicy("http://127.0.0.1:9/v1", "m", processed=False)
  for changes, message in (
    ({"router_choices": True}, "router_choices"),
    ({"top_logps": 1}, "top_logps"),
    ({"sampling": Sampling(temperature=0.5)}, "processed"),
    ({"sampling": Sampling(top_k=5)}, "processed"),
    ({"logit_bias": ((1, 1.0),)}, "processed"),
    ({"sampling": Sampling(temperature=0.5), "greedy": True}, "greedy"),
  ):
    with pytest.raises(ValueError, match=message):
      policy.ask(dataclasses.replace(ASKED, **changes))


@pytest.mark.slow
def test_errors_of_the_server_are_passed_on(policy, micro):
  with pytest.raises(PolicyError, match="1024 that they may be together"):
    policy.ask(dataclasses.replace(ASKED, max_tokens=5000))
  with pytest.raises(PolicyError, match="401"):
    OpenAIPolicy(f"{micro.url}/v1", api_key="wrong")
  with pytest.raises(PolicyError, match="not 'other'"):
    OpenAIPolicy(f"{micro.url}/v1", "other", api_key=KEY)


GOOD = {"index": 0, "text": "x", "finish_reason": "stop", "token_ids": [5, 6]}
GOOD |= {"logprobs": {"token_logprobs": [-1.0, -0.5]}}


class Canned(http.server.BaseHTTPRequestHandler):
  """Other servers as they have been seen: each answer is given once, the last for ever."""

  def do_POST(self):
    self.rfile.read(int(self.headers["Content-Length"]))
    answers = self.server.answers
    status, body, headers = answers.pop(0) if len(answers) > 1 else answers[0]
    self.server.seen += 1
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(status)
    for name, value in {**headers, "Content-Length": len(data)}.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *_):
    pass


@pytest.fixture
def canned(monkeypatch):
  monkeypatch.setattr(openai_http, "_FIRST_PAUSE", 0.01)
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Canned)
  server.seen = 0
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()

  def ask(*answers):
    server.answers = [(a if isinstance(a, tuple) else (200, a, {})) for a in answers]
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with OpenAIPolicy(url, "m", processed=False, retries=2) as policy:
      return policy.ask(ASKED), server.seen

  yield ask
  server.shutdown()
  thread.join()
  server.server_close()


def test_an_answer_without_extensions_of_rome(canned):
  reply, _ = canned({"choices": [GOOD]})
  assert (reply.tokens, reply.logps, reply.finish) == ([5, 6], [-1.0, -0.5], "stop")
  assert (reply.version, reply.cached) == (-1, 0)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"token_ids": None}, "no token ids.*vLLM 0.10"),
    ({"logprobs": None}, "no log-probs"),
    ({"logprobs": {"token_logprobs": [-1.0]}}, "each sampled token"),
    ({"logprobs": {"token_logprobs": [-1.0, None]}}, "no numbers"),
    ({"logprobs": {"token_logprobs": [-1.0, 0.5]}}, "no numbers"),
    ({"token_ids": [], "logprobs": {"token_logprobs": []}}, "each sampled token"),
    ({"finish_reason": "abort"}, "ended with 'abort'"),
    ({"prompt_token_ids": [1]}, "changed the prompt"),
  ],
)
def test_answers_that_are_no_good(canned, changes, message):
  with pytest.raises(PolicyError, match=message):
    canned({"choices": [{**GOOD, **changes}]})


@pytest.mark.parametrize("body", [b"<html>", b"[]", {}, {"choices": []}, {"choices": [7]}])
def test_answers_that_are_none(canned, body):
  with pytest.raises(PolicyError):
    canned((200, body, {}))


def test_a_busy_server_is_asked_again(canned):
  busy = (429, {"error": {"message": "full"}}, {"Retry-After": "0"})
  reply, seen = canned(busy, {"choices": [GOOD]})
  assert reply.tokens == [5, 6] and seen == 2


def test_it_gives_up_in_the_end(canned):
  with pytest.raises(PolicyError, match="503.*out of order"):
    canned((503, {"error": {"message": "out of order"}}, {}))


def test_what_is_wrong_is_not_asked_again(canned):
  with pytest.raises(PolicyError, match="400"):
    canned((400, {"error": {"message": "no such field"}}, {}), {"choices": [GOOD]})
