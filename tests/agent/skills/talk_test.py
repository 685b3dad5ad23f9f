"""Reminders, and what is told of loops and failing tools."""

import itertools

import pytest

from rome.agent.context import Context
from rome.agent.executor import Executor
from rome.agent.loop import Limits, Loop, drive
from rome.agent.model import ModelReply, ModelSettings
from rome.agent.skills import Compress, Detect, Remind
from rome.agent.skills.detect import _CLOCK
from rome.agent.tools.base import READ, Tool, ToolResult, parameters
from rome.text.render import Renderer
from tests.agent.skills.places import BYTES, Script, play, texts, use

ANY = {"type": "string"}
DONE = ModelReply("done")


def tool(name, run):
  return Tool(name, "Does.", parameters({"x": ANY}), run, READ)


LOOK = tool("look", lambda a: ToolResult(f"saw {a['x']}"))
BROKEN = tool("broken", lambda a: ToolResult("error: no route to host (errno 113)", "error"))


def told(requests, words):
  """Numbers of the requests whose last message says so."""
  return [i for i, request in enumerate(requests) if words in texts(request)[-1]]


def looks(*names):
  return [use("look", x=name) for name in names]


def test_the_objective_is_restated_every_few_turns_and_behind_a_rewrite():
  executor = Executor([LOOK])
  _, requests, _ = play(executor, [Remind(every=3)], *looks(*"abcdefg"), DONE)
  assert told(requests, "The objective is still:\nThe objective.") == [3, 6]
  long = [str(i) * 300 for i in range(5)]
  skills = [Remind(every=0), Compress(summary=False, turns=1)]
  _, requests, context = play(executor, skills, *looks(*long), *looks("a", "b"), DONE, limit=3400)
  assert context.row == 1
  (at,) = told(requests, "The objective is still:")
  assert len(requests[at - 1].messages) < len(requests[at - 2].messages)  # the turn behind it


def test_finished_items_and_the_next_one_are_told_once():
  state = [
    "- [~] find it\n- [ ] mend it",
    "- [x] find it\n- [ ] mend it",
    "- [x] find it\n- [x] mend it",
  ]
  seen = iter(state)
  todo = tool("todo", lambda a: ToolResult("noted"))
  current = [next(seen)]

  def step(arguments):
    current[0] = next(seen)
    return ToolResult("noted")

  todo = tool("todo", step)
  skill = Remind(every=0, todo=lambda: current[0])
  replies = [use("todo", x="1"), use("look", x="a"), use("todo", x="2"), DONE]
  _, requests, _ = play(Executor([LOOK, todo]), [skill], *replies)
  assert told(requests, "Done: find it. Next: mend it (1 left).") == [1]
  assert told(requests, "Done: mend it. Nothing is left on the todo list.") == [3]
  assert told(requests, "Done: ") == [1, 3]


def test_tools_that_come_and_go_are_told():
  names = iter([{"look"}, {"look", "a"}, {"a"}, {"a"}])
  skill = Remind(every=0, tools=lambda: next(names))
  _, requests, _ = play(Executor([LOOK]), [skill], *looks("1", "2", "3"), DONE)
  assert told(requests, "The tools have changed; new: a.") == [1]
  assert told(requests, "The tools have changed; no longer there: look.") == [2]
  assert told(requests, "The tools") == [1, 2]


@pytest.mark.parametrize(("cycle", "first"), [("a", 4), ("ab", 5), ("abc", 6)])
def test_a_loop_is_named_then_ended(cycle, first):
  names = itertools.cycle(cycle)
  replies = [use("look", x=next(names)) for _ in range(50)]
  outcome, requests, _ = play(Executor([LOOK]), [Detect(repeats=3, patience=4)], *replies)
  assert outcome.reason == "loop_detected"
  warned = told(requests, "turns brought nothing new")
  assert warned[0] == first and f'look({{"x": "{cycle[-1]}"}})' in texts(requests[first])[-1]
  assert outcome.turns == first + 4 and "4 more" in texts(requests[first])[-1]


def test_clocks_hide_no_loop_and_progress_is_none():
  clock = itertools.count()
  ticking = tool(
    "test", lambda a: ToolResult(f"2 failed in 0.{next(clock)}s at 10:00:0{next(clock) % 9}")
  )
  outcome, _, _ = play(Executor([ticking]), [Detect(2, 2)], *[use("test", x="")] * 20)
  assert outcome.reason == "loop_detected"
  growing = tool("test", lambda a: ToolResult(f"{next(clock)} % done"))
  outcome, requests, _ = play(
    Executor([growing]), [Detect(2, 2)], *[use("test", x="")] * 20, limits=Limits(turns=12)
  )
  assert outcome.reason == "max_turns" and not told(requests, "nothing new")


def test_something_new_clears_the_count():
  replies = looks(*"aaabaaac") + [DONE]
  outcome, requests, _ = play(Executor([LOOK]), [Detect(repeats=3, patience=2)], *replies)
  assert outcome.reason == "answered" and told(requests, "nothing new") == [7]


def test_a_failing_tool_is_named_with_its_error():
  replies = [use("broken", x=str(i)) for i in range(6)] + [DONE]
  outcome, requests, _ = play(Executor([BROKEN]), [Detect(repeats=3)], *replies)
  assert outcome.reason == "answered"
  assert told(requests, "broken failed 3 times in a row") == [3]
  assert told(requests, "broken failed 6 times in a row with the same error: error: no route") == [
    6
  ]


def test_replies_that_are_cut_off_again_and_again_are_a_loop():
  replies = [ModelReply("I think", finish="length")] * 20
  outcome, requests, _ = play(Executor([LOOK]), [Detect(repeats=2, patience=3)], *replies)
  assert (outcome.reason, outcome.turns) == ("loop_detected", 6)
  assert told(requests, "the reply 'I think'") == [3, 4, 5]


def test_a_new_instruction_begins_anew():
  """The same answer to several instructions is no loop, nor does a loop end what comes after it."""
  executor = Executor([LOOK])
  context = Context(ModelSettings("m", 50), executor.schemas(), 9000, Renderer(BYTES))
  loop = Loop(context, executor, Limits(), [Detect(repeats=2, patience=1)])
  for _ in range(4):
    script = Script(DONE)
    assert drive(loop.run("Go on."), script).reason == "answered"
    assert texts(script.requests[0])[-1] == "Go on."
  assert drive(loop.run("Look."), Script(*looks(*"aaaaaa"))).reason == "loop_detected"
  assert drive(loop.run("Look."), Script(*looks("a"), DONE)).reason == "answered"


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"patience": -1}])
def test_bad_settings_are_named(wrong):
  with pytest.raises(ValueError, match="Detect: "):
    Detect(**wrong)


@pytest.mark.timeout(60)
def test_a_result_of_digits_holds_nothing_up():
  """100,000 of them took minutes, in which no thread of the run could do anything."""
  assert _CLOCK.sub("#", "1" * 100_000) == "1" * 100_000
  assert _CLOCK.sub("#", "took 12.5 s at 10:00:01.25") == "took # at #"
