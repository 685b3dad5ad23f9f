"""Summaries: asked for as one more chunk of the row, then a new row; always an end."""

import json

import pytest

from rome.agent.context import Context
from rome.agent.executor import Executor
from rome.agent.loop import Limits, Loop, drive, reminder
from rome.agent.model import ModelReply, ModelSettings
from rome.agent.skills import Compress
from rome.agent.skills.compress import ASK, LOST
from rome.agent.tools.base import READ, Tool, ToolResult, parameters
from rome.text.render import Renderer
from tests.agent.skills.places import BYTES, Script, play, texts, use

LOOK = Tool(
  "look", "Looks.", parameters({"at": {"type": "integer"}}),
  lambda arguments: ToolResult(f"value {arguments['at']} " + "x" * 200), READ,
)  # fmt: skip
EXECUTOR = Executor([LOOK])


def looks(n):
  return [use("look", at=i) for i in range(n)]


def test_a_summary_is_a_chunk_of_the_row_and_opens_the_next():
  left = []
  skill = Compress(turns=2, todo=lambda: "- [ ] count", archive=left.extend)
  summary = ModelReply("I saw values 0 to 5.", finish="stop", completion_tokens=9)
  replies = [*looks(6), summary, use("look", at=6), ModelReply("done")]
  outcome, requests, context = play(EXECUTOR, [skill], *replies, limit=1700)
  assert (outcome.reason, outcome.tokens, context.row) == ("answered", 9, 1)
  asked = [i for i, r in enumerate(requests) if r.purpose == "summary"]
  assert asked == [6]
  request, before = requests[6], requests[5]
  assert request.messages[-1]["content"].count(ASK) == 1
  assert tuple(request.ids[: len(before.ids)]) == tuple(before.ids)  # of the same row
  new = requests[7]
  assert texts(new)[:2] == ["Be brief.", "The objective."]
  assert "I saw values 0 to 5." in texts(new)[2] and "- [ ] count" in texts(new)[2]
  assert [m["role"] for m in new.messages[3:]] == ["assistant", "tool"] * 2
  assert new.messages[-1] == request.messages[-2]  # the last turns word by word
  gone = [m["content"][:7] for m in left if m["role"] == "tool"]
  assert gone == ["value 0", "value 1", "value 2", "value 3"]


@pytest.mark.parametrize("said", ["", "<think>only</think>", "<think>cut off", " \n"])
def test_without_a_summary_a_note_says_so(said):
  replies = [*looks(6), ModelReply(said), use("look", at=6), ModelReply("done")]
  outcome, requests, _ = play(EXECUTOR, [Compress(turns=2)], *replies, limit=1700)
  assert outcome.reason == "answered" and LOST in texts(requests[7])[2]


def test_an_endless_summary_is_cut_and_every_compaction_makes_room():
  def complete(request):
    if request.purpose == "summary":
      return ModelReply("words " * 5000, finish="length")
    return use("look", at=len(sizes))

  sizes = []

  def model(request):
    sizes.append((request.purpose, len(request.ids)))
    return complete(request)

  outcome, requests, context = play(
    EXECUTOR, [Compress()], *[model] * 200, limit=2400, limits=Limits(turns=60)
  )
  assert outcome.reason == "max_turns" and context.row > 3
  assert max(size for _, size in sizes) + 50 <= 2400
  behind = [b for (a, _), (_, b) in zip(sizes, sizes[1:], strict=False) if a == "summary"]
  assert behind and max(behind) <= 1200  # half of what it acts at, and a turn


def test_the_newest_result_is_shortened_rather_than_lost():
  huge = Tool(
    "look", "Looks.", LOOK.parameters, lambda a: ToolResult("head\n" + "y\n" * 3000 + "tail"), READ
  )
  replies = [use("look", at=0), ModelReply("sum"), ModelReply("done")]
  outcome, requests, _ = play(Executor([huge]), [Compress()], *replies, limit=2400)
  assert outcome.reason == "answered" and [r.purpose for r in requests][1] == "summary"
  last = texts(requests[-1])[-1]
  assert last.startswith("head") and last.endswith("tail") and "left out" in last


def test_what_cannot_be_made_shorter_ends_as_context_full():
  outcome, requests, context = play(EXECUTOR, [Compress()], *looks(9), limit=160)
  assert (outcome.reason, len(requests), context.row) == ("context_full", 1, 0)


def test_a_later_instruction_is_kept_and_compaction_may_be_asked_for():
  context = Context(ModelSettings("m", 50), EXECUTOR.schemas(), 9000, Renderer(BYTES))
  skill = Compress(turns=0)
  loop = Loop(context, EXECUTOR, Limits(), [skill], "Be brief.")
  drive(loop.run("First."), Script(*looks(3), ModelReply("one")))
  steps = skill.compress(context)
  assert next(steps).purpose == "summary"
  with pytest.raises(StopIteration):
    steps.send(ModelReply("all of it"))
  script = Script(ModelReply("two"))
  assert drive(loop.run("Second."), script).text == "two"
  first, second, note, last = texts(script.requests[0])[0:4]
  assert (first, second, last) == ("Be brief.", "First.", "Second.") and "all of it" in note
  assert list(script.requests[0].ids) == Renderer(BYTES).prompt(
    script.requests[0].messages, EXECUTOR.schemas()
  )


def test_what_the_user_said_stays_and_what_the_system_said_goes():
  context = Context(ModelSettings("m", 50), EXECUTOR.schemas(), 9000, Renderer(BYTES))
  said = [reminder("all of it"), f"{reminder('by the way')}\nTwo.", "Three."]
  context.begin([{"role": "user", "content": said[0]}])
  for text in (reminder("a"), *said[1:], f"{reminder('b')}\n{reminder('c')}"):
    context.reply(use("look", at=1))
    context.append([{"role": "user", "content": text}])
  with pytest.raises(StopIteration):
    next(Compress(turns=0, summary=False).compress(context))
  assert [m["content"] for m in context.messages] == [*said, reminder(LOST)]


def test_without_a_tokenizer_sizes_are_those_that_the_endpoint_reports():
  """An endpoint whose tokens have two characters, and which refuses what is too long."""
  limit, sizes = 1200, []

  def model(request):
    size = len(json.dumps([*request.messages, *request.tools], ensure_ascii=False)) // 2
    sizes.append(size)
    assert size + 50 <= limit
    if request.purpose == "summary":
      return ModelReply("Nothing yet.", prompt_tokens=size, completion_tokens=6)
    reply = use("look", at=len(sizes))
    return ModelReply("", reply.calls, prompt_tokens=size, completion_tokens=80)

  context = Context(ModelSettings("m", 50), EXECUTOR.schemas(), limit)
  loop = Loop(context, EXECUTOR, Limits(turns=30), [Compress(turns=2)])
  script = Script(*[model] * 60)
  assert drive(loop.run("Look."), script).reason == "max_turns"
  asked = sum(request.purpose == "summary" for request in script.requests)
  assert asked > 3 and len(script.requests) == 30 + asked and context.row >= asked


@pytest.mark.parametrize("wrong", [{"at": 0.5, "goal": 0.6}, {"at": 1.5}, {"turns": -1}])
def test_bad_settings_are_named(wrong):
  with pytest.raises(ValueError, match="Compress: "):
    Compress(**wrong)
