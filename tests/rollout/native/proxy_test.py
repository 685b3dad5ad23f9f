"""The proxy through the official client: keys, one chunk a request however often it is sent."""

import dataclasses
import json
import socket
import threading
import time

import httpx
import jax
import openai
import pytest

from rome import models
from rome.agent.context import Context
from rome.agent.model import ModelSettings
from rome.agent.openai_model import OpenAIModel
from rome.rollout.engine import Engine
from rome.rollout.groups import Member
from rome.rollout.native import Proxy, Sessions, Terms
from rome.text import ByteTokenizer
from rome.text.render import Renderer

pytestmark = pytest.mark.slow

CONFIG = models.PRESETS["micro"]
T = ByteTokenizer()
SAMPLING = models.Sampling(temperature=0.7)
MAX_REPLY, CONTEXT, MAX_CALLS = 12, 256, 4
SHELL = {
  "type": "function",
  "function": {"name": "sh", "parameters": {"type": "object", "properties": {}}},
}
HI = [{"role": "user", "content": "hi"}]


class Run:
  """A proxy, and a thread that runs the engine for it until it is told to hold."""

  def __init__(self):
    terms = Terms(Renderer(T), (T.end,), SAMPLING, MAX_REPLY, CONTEXT, MAX_CALLS)
    self.sessions = Sessions(terms)
    self.sampled = 0
    self.go = threading.Event()
    self._ended = False
    self._engine = Engine(CONFIG, slots=4, max_length=CONTEXT, stop_tokens=(T.end,))
    self._engine.publish(models.init_params(CONFIG, jax.random.key(0)), 0, jax.random.key(1))
    self._thread = threading.Thread(target=self._drive, daemon=True)
    self.go.set()
    self._thread.start()

  def _drive(self):
    asked = {}
    while not self._ended:
      self.go.wait()
      asked |= {self._engine.submit(ask.request): ask for ask in self.sessions.take()}
      if not asked:
        time.sleep(0.002)
      for update in self._engine.step() if asked else ():
        if update.reply:
          self.sampled += 1
          asked.pop(update.id).done.set_result(update.reply)

  def close(self):
    self._ended = True
    self.go.set()
    self._thread.join()


@pytest.fixture(scope="module")
def run():
  run = Run()
  yield run
  run.close()


@pytest.fixture(scope="module")
def proxy(run):
  with Proxy(run.sessions, "rome") as proxy:
    yield proxy


@pytest.fixture
def session(run):
  run.go.set()
  session = run.sessions.open(Member(3, 1))
  yield session
  session.end()


@pytest.fixture
def client(proxy, session):
  return openai.OpenAI(base_url=proxy.url, api_key=session.key, max_retries=0, timeout=60)


def chat(client, messages=HI, **arguments):
  return client.chat.completions.create(model="rome", messages=messages, **arguments)


def test_a_conversation_is_recorded(client, session):
  first = chat(client)
  (choice,) = first.choices
  messages = [*HI, choice.message.model_dump(), {"role": "user", "content": "more"}]
  second = chat(client, messages)
  one, two = session.record.log
  assert two.parent == 0 and two.context[: first.usage.total_tokens] == [
    *one.context, *one.reply.tokens,
  ]  # fmt: skip
  assert first.usage.completion_tokens == len(one.reply.tokens) <= MAX_REPLY
  assert second.usage.prompt_tokens == len(two.context)
  assert choice.message.content == one.message["content"]
  assert first.model == "rome" and choice.finish_reason in ("stop", "length")
  assert [m.id for m in client.models.list()] == ["rome"]


def test_the_same_bytes_and_ids_as_in_managed_mode(proxy, session):
  """One conversation of rome's own agent over HTTP, and inside a trainer."""
  settings = ModelSettings("rome", MAX_REPLY)
  far = Context(settings, [SHELL], CONTEXT, Renderer(T))
  near = Context(settings, [SHELL], CONTEXT, Renderer(T))
  model = OpenAIModel(proxy.url, session.key)
  for context in (far, near):
    context.begin([{"role": "system", "content": "be brief"}, *HI])
  for turn in range(3):
    assert far.request().wire() == near.request().wire()
    reply = model.complete(far.request())
    call = session.record.log[turn]
    assert call.context == list(near.request().ids)
    far.reply(reply)
    near.reply(dataclasses.replace(reply, ids=tuple(call.reply.tokens)))
    for context in (far, near):
      context.append([{"role": "user", "content": f"turn {turn}"}])
    assert far.tokens() == near.tokens()  # though `far` was not told the ids of the replies
  assert [call.parent for call in session.record.log] == [None, 0, 1]


def test_a_stream_is_the_same_call(client, session):
  whole = chat(client)
  chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
  assert {chunk.id for chunk in chunks} == {whole.id}
  said = [chunk.choices[0] for chunk in chunks[:-1]]
  assert "".join(c.delta.content or "" for c in said) == whole.choices[0].message.content
  assert said[-1].finish_reason == whole.choices[0].finish_reason
  assert chunks[-1].usage == whole.usage
  assert session.record.calls == 1


def test_the_same_however_it_is_written(proxy, session):
  """Keys in another order, other white space; and half a surrogate pair, which UTF-8 has not."""
  tool = {"name": "sh", "parameters": {"type": "object", "title": "\ud800"}}
  turned = {"parameters": {"title": "\ud800", "type": "object"}, "name": "sh"}
  said = [{"role": "user", "content": "a \udc80 b"}]
  one = post(proxy, session, said, tools=[{"type": "function", "function": tool}])
  two = post(proxy, session, said, tools=[{"function": turned, "type": "function"}], indent=1)
  assert one.status_code == 200 and one.text == two.text and session.record.calls == 1


def test_sampling_is_the_runs(client, session):
  plain = chat(client)
  cold = client.chat.completions.with_raw_response.create(
    model="rome", messages=HI, temperature=0, max_tokens=1, seed=7
  )
  assert cold.headers["x-rome-overridden"] == "temperature, seed, max_tokens"
  assert len(session.record.log[1].reply.tokens) > 1 and plain.usage.completion_tokens > 1
  assert session.record.calls == 2  # another body is another call


@pytest.mark.parametrize(
  "given, message",
  [
    ({"n": 2}, "n must be 1: a call is one chunk"),
    ({"stop": "x"}, "stop is not supported by the model proxy of training: leave it out"),
    ({"logit_bias": {"1": 1.0}}, "logit_bias is not supported by the model proxy"),
    ({"logprobs": True}, "logprobs is not supported by the model proxy"),
    ({"frequency_penalty": 0.5}, "frequency_penalty is not supported: leave it out"),
    ({"extra_body": {"foo": 1}}, "foo: this field is not known"),
    ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "are more than the 256"),
    ({"messages": [{"role": "user", "content": "x" * (1 << 20)}]}, "are more than the 256"),
  ],
)
def test_refusals_are_clear_and_no_calls(client, session, given, message):
  with pytest.raises(openai.BadRequestError, match=message):
    chat(client, **given)
  assert session.record.calls == 0


def test_keys(client, proxy, run, session):
  other = run.sessions.open(Member(9, 0))
  assert httpx.get(f"{proxy.url}/models", trust_env=False).status_code == 401
  for key in ("nope", session.id, other.key[:-1]):
    with pytest.raises(openai.AuthenticationError):
      chat(client.with_options(api_key=key))
  assert chat(client.with_options(api_key=other.key)).id != chat(client).id
  assert (session.record.calls, other.record.calls) == (1, 1)
  other.end()
  with pytest.raises(openai.AuthenticationError):
    chat(client.with_options(api_key=other.key))
  chat(client)  # the others go on


def test_one_call_too_many_ends_the_episode(client, session):
  for n in range(MAX_CALLS):
    chat(client, [{"role": "user", "content": str(n)}])
  chat(client, [{"role": "user", "content": "0"}])  # known: no new call
  assert session.stopped == ""
  with pytest.raises(openai.PermissionDeniedError, match="has had its 4 calls"):
    chat(client, [{"role": "user", "content": "more"}])
  assert session.stopped == "max_turns" and session.record.calls == MAX_CALLS


def post(proxy, session, body=HI, timeout=60.0, indent=None, **fields):
  return httpx.post(
    f"{proxy.url}/chat/completions",
    content=json.dumps({"model": "rome", "messages": body, **fields}, indent=indent),
    headers={"Authorization": f"Bearer {session.key}", "Content-Type": "application/json"},
    timeout=timeout,
    trust_env=False,
  )


def test_two_at_once_are_one_chunk(proxy, run, session):
  before = run.sampled
  run.go.clear()
  answers = {}
  threads = [
    threading.Thread(target=lambda i=i: answers.setdefault(i, post(proxy, session)))
    for i in range(5)
  ]
  for thread in threads:
    thread.start()
  while session.record.calls == 0:
    time.sleep(0.01)
  run.go.set()
  for thread in threads:
    thread.join()
  assert len({answer.text for answer in answers.values()}) == 1
  assert session.record.calls == 1 and run.sampled == before + 1


def test_a_dropped_connection_loses_nothing(proxy, run, session):
  """The client hangs up while the policy is asked, and sends the same again."""
  before = run.sampled
  run.go.clear()
  with pytest.raises(httpx.ReadTimeout):
    post(proxy, session, timeout=1.0)
  assert session.record.calls == 1 and session.silence() == 0  # it goes on
  run.go.set()
  assert session.settle(30)
  assert session.record.log[0].reply is not None
  found = post(proxy, session, stream=True).text
  assert json.dumps(session.record.log[0].message["content"]) in found
  assert session.record.calls == 1 and run.sampled == before + 1


def test_retries_of_the_client_are_one_chunk(proxy, run, session):
  """The official client's own, after its time-outs."""
  run.go.clear()
  impatient = openai.OpenAI(base_url=proxy.url, api_key=session.key, max_retries=9, timeout=1.0)
  threading.Timer(2.5, run.go.set).start()
  assert chat(impatient).choices[0].message.role == "assistant"
  assert session.record.calls == 1


def test_an_answer_to_nobody_is_told_to_none(proxy, run, session):
  """The episode ends while a call is under way: its key is void, the call is answered."""
  run.go.clear()
  answer = []
  thread = threading.Thread(target=lambda: answer.append(post(proxy, session)))
  thread.start()
  while session.record.calls == 0:
    time.sleep(0.01)
  session.end()
  assert post(proxy, session).status_code == 401
  run.go.set()
  thread.join()
  assert answer[0].status_code == 200 and session.settle(30)


def test_garbage_does_not_bring_it_down(client, proxy, session):
  host, port = proxy.address
  head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {session.key}\r\n"
  for rest in (
    'Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"model":',
    "Content-Type: application/json\r\nContent-Length: 99999999\r\n\r\n",
    f"Content-Type: application/json\r\nContent-Length: 60000\r\n\r\n{'[' * 60000}",
    "\0\r\n\r\n",
  ):
    with socket.create_connection((host, port), 10) as connection:
      connection.sendall((head + rest).encode())
      status = connection.recv(1 << 16).split(b" ", 2)[1]
      assert status in (b"400", b"413")
  assert chat(client).choices and session.record.calls == 1


def status_of(proxy, session):
  try:
    return post(proxy, session).status_code
  except httpx.RemoteProtocolError:  # it hung up
    return 599


def test_the_server_ends_with_its_context():
  sessions = Sessions(Terms(Renderer(T), (T.end,), SAMPLING, MAX_REPLY, CONTEXT, MAX_CALLS))
  with Proxy(sessions, "rome") as proxy:
    session = sessions.open(Member(0, 0))
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(status_of(proxy, session)))
    waiting.start()
    while session.record.calls == 0:
      time.sleep(0.01)
  waiting.join(20)
  assert answers[0] >= 500
  with pytest.raises(httpx.ConnectError):
    post(proxy, session)
