"""The loop: calls, answers, limits; contexts that only grow; requests in one shape."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.agent.context import Context
from rome.agent.executor import MAX_CALLS, Executor
from rome.agent.loop import CUT_OFF, MALFORMED, Limits, Loop, Skill, drive
from rome.agent.model import Call, ModelReply, ModelSettings
from rome.agent.tools.base import EXECUTE, READ, Tool, ToolResult, parameters
from rome.text import ByteTokenizer
from rome.text.render import Renderer

BYTES = ByteTokenizer()
SETTINGS = ModelSettings("m", 50)
NO_LIMITS = Limits()


def echo(arguments):
  return ToolResult(f"said {arguments['words']}")


ECHO = Tool(
  "echo", "Says it.", parameters({"words": {"type": "string"}}), echo, READ, parallel=True
)


class Script:
  """A model that gives these replies and keeps the requests."""

  def __init__(self, *replies):
    self.replies, self.requests = list(replies), []

  def complete(self, request):
    self.requests.append(request)
    return self.replies.pop(0)


def call(words="x", name="echo"):
  return Call("drawn", name, json.dumps({"words": words}))


def play(*replies, limits=NO_LIMITS, limit=4000, renderer=None, tools=(ECHO,), skills=()):
  script, executor = Script(*replies), Executor(tools)
  context = Context(SETTINGS, executor.schemas(), limit, renderer)
  outcome = drive(Loop(context, executor, limits, skills, "be brief").run("go"), script)
  return outcome, script.requests


def test_a_conversation_to_its_answer():
  outcome, requests = play(ModelReply("", (call("a"), call("b"))), ModelReply("done"))
  assert (outcome.reason, outcome.text, outcome.turns) == ("answered", "done", 2)
  first, second = (request.body() for request in requests)
  assert [m["role"] for m in first["messages"]] == ["system", "user"]
  calls = second["messages"][2]["tool_calls"]
  assert [c["id"] for c in calls] == ["call_0_0", "call_0_1"]
  results = [(m["tool_call_id"], m["content"]) for m in second["messages"][3:]]
  assert results == [("call_0_0", "said a"), ("call_0_1", "said b")]
  assert json.loads(requests[1].wire()) == json.loads(json.dumps(second))


@pytest.mark.parametrize(
  ("limits", "limit", "reason"),
  [
    (Limits(turns=2), 4000, "max_turns"),
    (Limits(tokens=3), 4000, "max_tokens"),
    (Limits(seconds=1e-9), 4000, "deadline"),
    (Limits(), 60, "context_full"),
  ],
)
def test_limits_end_it_with_their_reason(limits, limit, reason):
  replies = [ModelReply("", (call(),), completion_tokens=2)] * 9
  outcome, _ = play(*replies, limits=limits, limit=limit, renderer=Renderer(BYTES))
  assert outcome.reason == reason and outcome.text == ""


@pytest.mark.parametrize(
  ("reply", "told"),
  [
    (ModelReply("I was going to", finish="length"), CUT_OFF),
    (ModelReply('<tool_call>{"name": 1}</tool_call>'), MALFORMED),
    (ModelReply("<|call|>"), MALFORMED),
  ],
)
def test_a_reply_that_is_no_answer_is_told_so(reply, told):
  outcome, requests = play(reply, ModelReply("done"))
  assert outcome.reason == "answered"
  assert told in requests[1].messages[-1]["content"]


def test_an_answer_may_speak_of_the_format():
  told = "Calls stand between `<tool_call>` and `</tool_call>`, or behind `<|call|>`."
  outcome, _ = play(ModelReply(told))
  assert (outcome.reason, outcome.text) == ("answered", told)


@pytest.mark.parametrize(
  ("wanted", "outcome", "says"),
  [
    (Call("", "ehco", "{}"), "unknown_tool", "there are: echo"),
    (Call("", "echo", "{"), "invalid_arguments", "no JSON"),
    (Call("", "echo", "[]"), "invalid_arguments", "not of type 'object'"),
    (Call("", "echo", '{"words": 3}'), "invalid_arguments", "arguments.words: 3 is not"),
    (Call("", "echo", '{"word": "x"}'), "invalid_arguments", "it takes: words"),
    (Call("", "echo", 9000 * "["), "invalid_arguments", "no JSON"),
    (Call("", "echo", "x" * (2 << 20)), "invalid_arguments", "at most"),
  ],
)
def test_a_bad_call_is_an_error_that_the_model_can_act_on(wanted, outcome, says):
  (result,) = run(Executor([ECHO]), wanted)
  assert result.outcome == outcome and says in result.text and len(result.text) < 600


def run(executor, *calls):
  try:
    next(executor.run(calls))
  except StopIteration as end:
    return end.value
  raise AssertionError("it asked the model")


def test_a_bomb_of_calls_runs_so_many():
  results = run(Executor([ECHO]), *[call(str(i)) for i in range(500)])
  assert [r.text for r in results[:MAX_CALLS]] == [f"said {i}" for i in range(MAX_CALLS)]
  assert {r.outcome for r in results[MAX_CALLS:]} == {"skipped"} and len(results) == 500


def test_calls_that_change_something_wait_for_those_before_them():
  order = []

  def note(arguments):
    order.append(arguments["words"])
    return ToolResult(f"ran {len(order)}")

  slow = dataclasses.replace(ECHO, name="look", run=note)
  act = dataclasses.replace(ECHO, name="act", run=note, kind=EXECUTE, parallel=False)
  calls = [call(str(i), name) for i, name in enumerate(["look", "look", "act", "look", "act"])]
  results = run(Executor([slow, act]), *calls)
  assert sorted(order[:2]) == ["0", "1"] and order[2:] == ["2", "3", "4"]
  assert results[2].text == "ran 3" and results[4].text == "ran 5"


def test_gates_and_observers():
  def gate(tool, arguments):
    return ToolResult("no", "denied") if arguments["words"] == "rm" else None

  def loud(tool, arguments, result):
    return dataclasses.replace(result, text=result.text.upper())

  ran, refused = run(Executor([ECHO], [gate], [loud]), call("a"), call("rm"))
  assert (ran.text, refused.text, refused.outcome) == ("SAID A", "no", "denied")


class Rewriter(Skill):
  """Begins a new context behind a summary that it asks for."""

  def before(self, context):
    if len(context.messages) > 6:
      reply = yield context.request("summary")
      context.rewrite([{"role": "user", "content": f"so far: {reply.content}"}])


REPLY = st.one_of(
  st.builds(
    lambda words, text: ModelReply(text, tuple(call(w) for w in words)),
    st.lists(st.text(max_size=8), min_size=1, max_size=3),
    st.text(max_size=8),
  ),
  st.builds(lambda text: ModelReply(text, finish="length"), st.text(max_size=20)),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(REPLY, max_size=9), st.booleans())
def test_what_was_rendered_stays_until_an_explicit_edit(replies, rewrites):
  """Ids and messages of a request begin with those of the one before, the sampled ids included."""
  sampled = []

  class Sampling(Script):
    def complete(self, request):
      reply = super().complete(request)
      ids = (*BYTES.encode(reply.content), BYTES.end)
      sampled.append(ids)
      return dataclasses.replace(reply, ids=ids)

  script, executor = Sampling(*replies, *[ModelReply("so")] * 9), Executor([ECHO])
  context = Context(SETTINGS, executor.schemas(), 1 << 20, Renderer(BYTES))
  drive(Loop(context, executor, Limits(), [Rewriter()] if rewrites else []).run("go"), script)
  before = None
  for request, ids in zip(script.requests, sampled, strict=True):
    if before is not None:
      grown = (*before[0].ids, *before[1])
      same = tuple(request.ids[: len(grown)]) == grown
      assert same or (rewrites and request.messages[0]["content"].startswith("so far"))
      if same and request.purpose == "turn":
        assert tuple(request.messages[: len(before[0].messages)]) == tuple(before[0].messages)
    before = (request, ids) if request.purpose == "turn" else None
    assert list(request.ids[-1:]) == [BYTES.assistant]


def test_counts_without_a_tokenizer_are_those_of_the_endpoint():
  executor = Executor([ECHO])
  context = Context(SETTINGS, executor.schemas(), 4000)
  context.begin([{"role": "user", "content": "x" * 400}])
  assert 100 < context.tokens() < 250
  context.reply(ModelReply("y", prompt_tokens=70, completion_tokens=5))
  assert context.tokens() == 75
  context.append([{"role": "user", "content": "z" * 40}])
  assert 85 < context.tokens() < 100
