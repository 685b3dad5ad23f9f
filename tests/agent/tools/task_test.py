"""Sub-agents: private contexts, their own tools and limits, the caller's permissions."""

import dataclasses
import json

import pytest

from rome.agent.context import Context
from rome.agent.executor import Executor
from rome.agent.loop import Limits, Loop, Skill, drive
from rome.agent.model import Call, ModelReply, ModelSettings
from rome.agent.tools.base import READ, Tool, ToolResult, parameters
from rome.agent.tools.task import AgentDefinition, Surroundings, task_tool

SETTINGS = ModelSettings("m", 50)
AROUND = Surroundings(SETTINGS, 8000)
SCOUT = AgentDefinition("scout", "Looks things up.", "You look.", tools=("look",))
ALL = AgentDefinition("helper", "Does anything.", "You help.", limits=Limits(turns=2))


def tool(name):
  words = parameters({"words": {"type": "string"}})
  return Tool(name, name, words, lambda a: ToolResult(f"{name} {a['words']}"), READ)


def call(name, **arguments):
  return Call("drawn", name, json.dumps(arguments))


def ask(agent, instruction="find it"):
  return ModelReply("", (call("task", agent=agent, instruction=instruction),))


class Script:
  """A model that gives these replies and keeps the requests."""

  def __init__(self, *replies):
    self.replies, self.requests = list(replies), []

  def complete(self, request):
    self.requests.append(request)
    return self.replies.pop(0)


def play(*replies, around=AROUND, depth=1, definitions=(SCOUT, ALL)):
  tools = [tool("look"), tool("act")]
  tools.append(task_tool(definitions, tools, around, depth))
  executor = Executor(tools, around.gates, around.observers)
  script = Script(*replies)
  context = Context(SETTINGS, executor.schemas(), 8000)
  outcome = drive(Loop(context, executor, Limits(), (), "the caller").run("go"), script)
  return outcome, script.requests


def names(request):
  return [schema["function"]["name"] for schema in request.tools]


def test_only_the_answer_comes_back():
  look = ModelReply("", (call("look", words="here"),))
  outcome, requests = play(ask("scout"), look, ModelReply("it is there"), ModelReply("done"))
  assert outcome.text == "done" and outcome.turns == 2
  assert [r.purpose for r in requests] == ["turn", "scout", "scout", "turn"]
  assert [m["content"] for m in requests[1].messages] == ["You look.", "find it"]
  assert names(requests[1]) == ["look"] and names(requests[0]) == ["look", "act", "task"]
  assert requests[2].messages[-1]["content"] == "look here"
  assert [m["content"] for m in requests[3].messages[-1:]] == ["it is there"]
  assert len(requests[3].messages) == 4


@pytest.mark.parametrize(
  ("definition", "reply", "says"),
  [
    (ALL, ModelReply("", (call("look", words="x"),)), "2 turns: it had used up its turns"),
    (
      AgentDefinition("helper", "", "p", limits=Limits(tokens=5)),
      ModelReply("", (call("look", words="x"),), completion_tokens=9),
      "1 turns: it had used up its tokens",
    ),
    (
      AgentDefinition("helper", "", "p", context=700),
      ModelReply("", (call("look", words="x" * 4000),)),
      "its context was full",
    ),
    (ALL, ModelReply(""), "[it answered nothing]"),
    (ALL, ModelReply("y" * 90_000), "characters left out"),
  ],
)
def test_how_a_sub_agent_ends_is_told(definition, reply, says):
  replies = [reply] * (2 if "2 turns" in says else 1)
  _, requests = play(ask("helper"), *replies, ModelReply("done"), definitions=[definition])
  told = requests[-1].messages[-1]["content"]
  assert says in told and len(told) < 21_000


@pytest.mark.parametrize("depth", [1, 2])
def test_what_sub_agents_sample_counts_for_the_callers_limit(depth):
  def cost(reply):
    return dataclasses.replace(reply, completion_tokens=10)

  instruction = {"agent": "helper", "instruction": "help"}
  both = ModelReply("", (call("task", **instruction), call("task", **instruction)))
  inner = ask("helper", "deeper") if depth > 1 else ModelReply("", (call("look", words="x"),))
  tools = [tool("look")]
  executor = Executor([*tools, task_tool((SCOUT, ALL), tools, AROUND, depth)])
  context, script = Context(SETTINGS, executor.schemas(), 8000), Script(cost(both), cost(inner))
  outcome = drive(Loop(context, executor, Limits(tokens=20)).run("go"), script)
  requests = script.requests
  assert (outcome.reason, outcome.turns, outcome.tokens, len(requests)) == ("max_tokens", 1, 20, 2)
  said = [message["content"] for message in context.messages if message["role"] == "tool"]
  assert len(said) == 2  # no call is left without a result
  assert all("ended without an answer" in text and "used up its tokens" in text for text in said)


def test_permission_and_hooks_hold_for_sub_agents():
  seen = []

  def gate(tool, arguments):
    return ToolResult("denied: look", "denied") if tool.name == "look" else None

  def observer(tool, arguments, result):
    seen.append(tool.name)
    return result

  around = Surroundings(SETTINGS, 8000, gates=[gate], observers=[observer])
  work = ModelReply("", (call("look", words="x"), call("act", words="y")))
  _, requests = play(ask("helper"), work, ModelReply("ok"), ModelReply("done"), around=around)
  assert [m["content"] for m in requests[2].messages[-2:]] == ["denied: look", "act y"]
  assert seen == ["act", "task"]


def test_depth():
  _, requests = play(ask("helper"), ModelReply("ok"), ModelReply("done"))
  assert "task" not in names(requests[1])
  replies = [ask("helper"), ask("scout"), *[ModelReply("ok")] * 3]
  _, requests = play(*replies, depth=2)
  assert [r.purpose for r in requests] == ["turn", "helper", "helper/scout", "helper", "turn"]
  assert "task" in names(requests[1]) and names(requests[2]) == ["look"]
  result = play(ask("helper"), ask("scout"), *replies[2:])[1][2].messages[-1]
  assert "no tool 'task'" in result["content"]


class Summary(Skill):
  """Asks for a summary before each request."""

  def before(self, context):
    yield context.request("summary")


def test_what_a_skill_of_it_asks_can_be_told_apart():
  around = Surroundings(SETTINGS, 8000, skills=lambda name: [Summary()])
  _, requests = play(ask("scout"), *[ModelReply("x")] * 3, around=around)
  assert [r.purpose for r in requests] == ["turn", "scout/summary", "scout", "turn"]


def test_definitions_that_cannot_be_used_are_refused():
  with pytest.raises(ValueError, match="scout: no tool is named look"):
    task_tool([SCOUT], [tool("act")], AROUND)
  with pytest.raises(ValueError, match="at least one; got: none"):
    task_tool([], [], AROUND)
  with pytest.raises(ValueError, match="got: scout, scout"):
    task_tool([SCOUT, SCOUT], [tool("look")], AROUND)
  _, requests = play(ask("nobody"), ModelReply("done"))
  assert "'nobody' is not one of ['scout', 'helper']" in requests[1].messages[-1]["content"]
