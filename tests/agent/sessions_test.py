"""Conversations on disk, killed and taken up; as ATIF and back."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.agent import sessions
from rome.agent.atif import AtifError, from_atif, to_atif
from rome.agent.context import Context
from rome.agent.executor import Executor
from rome.agent.loop import Limits, Loop, Skill, drive
from rome.agent.model import REASONING, Call, ModelReply, ModelSettings
from rome.agent.sessions import (
  Session,
  SessionError,
  closed,
  load,
  record,
  repaired,
  settled,
  take_up,
)
from rome.agent.tools.base import READ, Tool, ToolResult, parameters

ECHO = Tool(
  "echo",
  "Says it.",
  parameters({"words": {"type": "string"}}),
  lambda a: ToolResult(a["words"]),
  READ,
)
SETTINGS = ModelSettings("m", 50)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))


class Replies:
  def __init__(self, *replies):
    self.replies = list(replies)

  def complete(self, request):
    return self.replies.pop(0)


class Rewriter(Skill):
  def before(self, context):
    if len(context.messages) > 5:
      reply = yield context.request("summary")
      context.rewrite([{"role": "user", "content": f"so far: {reply.content}"}])


def conversation():
  executor = Executor([ECHO])
  return Context(SETTINGS, executor.schemas(), 1 << 20), executor


def play(session, replies, skills=(), said="go"):
  context, executor = conversation()
  if before := session.messages():
    sessions.take_up(context, before)
  loop = Loop(context, executor, Limits(), skills, "be brief")
  outcome = drive(record(loop.run(said), context, session), Replies(*replies))
  return context, outcome


def call(words="x"):
  return Call("drawn", "echo", json.dumps({"words": words}))


def test_a_conversation_is_on_disk_and_goes_on():
  with Session.create("m", "/here") as session:
    context, _ = play(session, [ModelReply("", (call("a"),), ids=(1, 2)), ModelReply("done")])
    assert settled(load(session.path)) == context.messages
    assert session.path.stat().st_mode & 0o777 == 0o600
  with Session.resume(sessions.find(cwd="/here")) as again:
    context, _ = play(again, [ModelReply("", (call("b"),)), ModelReply("more")], said="and?")
    assert settled(load(again.path)) == context.messages
  roles = [m["role"] for m in context.messages]
  assert roles == ["system", *["user", "assistant", "tool", "assistant"] * 2]
  ids = [c["id"] for m in context.messages for c in m.get("tool_calls", ())]
  assert ids == ["call_0_0", "call_2_0"]


def test_cut_off_anywhere_it_can_be_taken_up():
  """At every byte: what is whole is kept, every call has a result, and a user may speak."""
  with Session.create("m", "/here") as session:
    play(session, [ModelReply("é", (call("a"), call("b"))), ModelReply("done")])
  data = session.path.read_bytes()
  first = data.index(b"\n") + 1
  for size in range(first, len(data)):
    session.path.write_bytes(data[:size])
    messages = repaired(load(session.path))
    if messages:
      assert messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    wanted = {c["id"] for m in messages for c in m.get("tool_calls", ())}
    assert wanted == {m["tool_call_id"] for m in messages if m["role"] == "tool"}
  with Session.resume(session.path) as again:
    play(again, [ModelReply("on")], said="go on")
  assert [m["content"] for m in settled(load(session.path))][-2:] == ["go on", "on"]


def test_thinking_beside_an_answer_is_taken_up_with_it():
  """Also where the program was killed between the reply and what came of it."""
  thought = {"reasoning": "hm"}
  with Session.create("m", "/here") as session:
    context, _ = play(session, [ModelReply("done", reasoning=thought)])
  assert context.messages[-1] == {"role": "assistant", "content": "done", **thought}
  records = load(session.path)
  assert sessions.repaired(records) == context.messages
  last = max(i for i, entry in enumerate(records) if entry["type"] == "reply")
  assert sessions.repaired(records[: last + 1]) == context.messages
  again, _ = conversation()
  take_up(again, context.messages)
  assert again.messages == context.messages


def test_what_cannot_be_used_is_named(tmp_path):
  with pytest.raises(SessionError, match="no conversation of /x yet"):
    sessions.find(cwd="/x")
  with pytest.raises(SessionError, match="is no conversation"):
    sessions.find("20")
  with pytest.raises(SessionError, match="is no name"):
    sessions.find("../x")
  with Session.create("m", "/x") as session, pytest.raises(SessionError, match="open in another"):
    Session.resume(session.path)
  text = session.path.read_text()
  session.path.write_text(text + "garbage\n" + text)
  with pytest.raises(SessionError, match="line 2 is damaged"):
    load(session.path)
  session.path.write_text("{}\n")
  with pytest.raises(SessionError, match="no conversation of rome agent"):
    load(session.path)


TEXT = st.text(max_size=8)
REPLY = st.one_of(
  st.builds(
    lambda words, text, ids: ModelReply(text, tuple(map(call, words)), "tool_calls", 5, 2, ids),
    st.lists(TEXT, min_size=1, max_size=3),
    TEXT,
    st.lists(st.integers(0, 99), max_size=3).map(tuple),
  ),
  st.builds(lambda text: ModelReply(text, (Call("", "echo", text),)), TEXT),
  st.builds(lambda text: ModelReply(text, finish="length"), TEXT),
  st.builds(
    lambda name, text: ModelReply("", (call(),), reasoning={name: text}),
    st.sampled_from(REASONING),
    TEXT,
  ),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(REPLY, max_size=8), st.booleans())
def test_there_and_back_nothing_is_lost(replies, rewrites):
  with Session.create("m", "/x", tools=[ECHO.schema()]) as session:
    play(session, [*replies, *[ModelReply("so")] * 9], [Rewriter()] if rewrites else [])
    records = session.records
  session.path.unlink()
  trajectory = json.loads(json.dumps(to_atif(records)))
  check(trajectory)
  back = from_atif(trajectory)
  assert settled(back) == settled(records) and back[0] == records[0]
  for kind in ("reply", "outcome"):
    key = lambda r: (r.get("purpose"), r["time"])  # noqa: E731
    assert sorted(of(back, kind), key=key) == sorted(of(records, kind), key=key)
  rows = [r["messages"] for r in back if r["type"] == "rewrite"]
  assert rows == [r["messages"] for r in records if r["type"] == "rewrite"]


def of(records, kind):
  return [r for r in records if r["type"] == kind]


def check(trajectory):
  """What the RFC asks for."""
  assert set(trajectory) <= {
    *("schema_version", "session_id", "agent", "steps", "notes", "final_metrics", "extra")
  }
  assert [s["step_id"] for s in trajectory["steps"]] == [*range(1, len(trajectory["steps"]) + 1)]
  for step in trajectory["steps"]:
    assert step["source"] in ("system", "user", "agent") and isinstance(step["message"], str)
    calls = {c["tool_call_id"] for c in step.get("tool_calls", ())}
    assert all(isinstance(c["arguments"], dict) for c in step.get("tool_calls", ()))
    assert step["source"] == "agent" or not calls and "metrics" not in step
    for result in step.get("observation", {}).get("results", ()):
      assert result["source_call_id"] in calls


def test_a_trajectory_of_somebody_elses():
  trajectory = {
    "schema_version": "ATIF-v1.2",
    "session_id": "s",
    "agent": {"name": "other", "version": "1", "model_name": "gpt"},
    "steps": [
      {"step_id": 1, "source": "user", "message": "go"},
      {
        "step_id": 2,
        "source": "agent",
        "message": "",
        "tool_calls": [{"tool_call_id": "c", "function_name": "f", "arguments": {"x": 1}}],
        "observation": {"results": [{"source_call_id": "c", "content": "ok"}]},
        "metrics": {"prompt_tokens": 3},
      },
    ],
  }
  messages = closed(settled(from_atif(trajectory)))
  assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
  assert messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'}
  for bad in ({}, {**trajectory, "schema_version": "x"}, {**trajectory, "steps": [3]}):
    with pytest.raises(AtifError):
      from_atif(bad)


@pytest.mark.parametrize(
  "more",
  [
    {"extra": {"rome": {"aside": [1]}}},
    {"extra": {"rome": {"aside": [{"type": "messages"}]}}},
    {"extra": {"rome": {"unsettled": [{"type": "reply"}]}}},
    {"extra": {"rome": {"unsettled": [{"type": "reply", "content": "", "calls": [["f"]]}]}}},
    {"extra": {"rome": {"outcomes": {"a": 1}}}},
    *(
      {"steps": [step]}
      for step in (
        {"source": "user", "message": 5},
        {"source": "nobody", "message": "x"},
        {"source": "user", "message": "x", "extra": {"message": "x"}},
        {"source": "user", "message": "x", "extra": {"message": {"role": "user"}}},
        {"source": "agent", "message": "x", "extra": {"message": {"role": "tool", "content": ""}}},
        {"source": "agent", "message": "x", "tool_calls": [{"tool_call_id": 1}]},
      )
    ),
  ],
)
def test_a_trajectory_of_nonsense_is_refused(more):
  good = {"schema_version": "ATIF-v1.5", "agent": {}, "steps": []}
  with pytest.raises(AtifError):
    from_atif({**good, **more})
  for odd in ({"extra": "x"}, {"extra": {"rome": [1]}}, {"extra": {"rome": {"session": "x"}}}):
    records = from_atif({**good, **odd})
    take_up(Context(ModelSettings("m", 1), [], 9), repaired(records))
