"""Any sequence of calls: rows hold exactly what was sampled, and nothing is tokenised twice."""

import dataclasses
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from rome.envs import generate
from rome.rollout.engine import Reply
from rome.rollout.groups import Member
from rome.rollout.native.record import Record
from rome.rollout.recorder import Episode
from rome.text import ByteTokenizer
from rome.text.render import Renderer
from rome.trajectory import Valid

T = ByteTokenizer()
TASK = generate("count", 0)
SHELL = {
  "type": "function",
  "function": {
    "name": "sh",
    "parameters": {
      "type": "object",
      "properties": {"command": {"type": "string"}},
      "required": ["command"],
    },
  },
}


@dataclasses.dataclass
class Counting(ByteTokenizer):
  """Tells what was tokenised."""

  encoded: int = 0

  def encode(self, text):
    self.encoded += len(text)
    return super().encode(text)


def reply_of(ids):
  """A reply with log-probs that tell where each token was sampled."""
  return Reply(0, list(ids), [-1.0 - i / 8 for i in range(len(ids))], 5, "stop", 0, [])


def ask(record, messages, ids, tools=()):
  """One call and its reply; the message that the agent gets, and the call."""
  call = record.read(messages, tools)
  record.begin(call)
  return record.answer(call, reply_of(ids)), call


def finish(record):
  return record.finish(Episode("t#0", TASK, Member(0, 0)), None, Valid(1.0), "submitted")


def sampled(trajectory, k):
  return trajectory.tokens[trajectory.call_ids == k].tolist()


texts = st.text(st.characters(codec="utf-8"), max_size=6)
tokens = st.lists(st.integers(0, T.vocab_size - 1), min_size=1, max_size=8)


@st.composite
def replies(draw):
  """What a policy may say: anything, or a call, ended or cut off."""
  words = draw(st.one_of(tokens, st.builds(lambda c: [T.call, *T.encode(f"sh {c}")], texts)))
  return [*words, T.end] if draw(st.booleans()) else words


def as_sent_back(draw, message):
  """The reply in a shape in which clients send it back."""
  found = dict(message)
  if not found["content"]:
    found["content"] = draw(st.sampled_from(["", None]))
  if calls := found.pop("tool_calls", None):
    indent = draw(st.sampled_from([None, 1]))
    found["tool_calls"] = [
      {
        "type": "function",
        "id": call["id"],
        "function": {
          "name": call["function"]["name"],
          "arguments": json.dumps(json.loads(call["function"]["arguments"]), indent=indent),
        },
      }
      for call in calls
    ]
  return found


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_rows_are_what_was_sampled(data):
  """An agent with several conversations that goes on, branches, forgets, and begins anew."""
  tokenizer = Counting()
  record = Record(Renderer(tokenizer), (T.end,))
  tools = data.draw(st.sampled_from([(), (SHELL,)]))
  conversations, said, calls = [], [], []
  for n in range(data.draw(st.integers(1, 8))):
    kind = data.draw(st.sampled_from(["on", "on", "on", "new", "forget"]))
    # What says the same is the same conversation; the proxy takes equal requests for one.
    new = [{"role": "user", "content": f"{n} {data.draw(texts)}"}]
    before = tokenizer.encoded
    if kind == "on" and conversations:
      old, parent = data.draw(st.sampled_from(conversations))
      messages, known = [*old, *new], parent
    elif kind == "forget" and conversations:
      old, _ = data.draw(st.sampled_from(conversations))
      messages, known = [{"role": "system", "content": "so far"}, *old[1:], *new], None
    else:
      messages, known = [{"role": "system", "content": data.draw(texts)}, *new], None
    ids = data.draw(replies())
    message, call = ask(record, messages, ids, tools)
    said.append(ids)
    if known is not None:  # exactly what it was, and the new words alone
      whole = [*known.context, *said[known.number]]
      assert call.context[: len(whole)] == whole
      assert tokenizer.encoded - before <= 40 + sum(len(m["content"]) for m in new)
      assert len(call.history) == len(messages) + 1
    conversations.append(([*messages, as_sent_back(data.draw, message)], call))
    calls.append(call)
  t = finish(record)
  assert t.num_chunks == len(calls)
  starts = [*getattr(t, "row_starts", (0,)), len(t.tokens)]
  for k, call in enumerate(calls):
    assert sampled(t, k) == said[k]
    at = int(np.argmax(t.call_ids == k))
    row = max(s for s in starts if s <= at)
    assert t.tokens[row:at].tolist() == call.context
    assert (t.logps[t.call_ids == k] == reply_of(said[k]).logps).all()
  assert (t.logps[t.call_ids < 0] == 0).all() and (t.versions == 5).all()


def conversation(*texts):
  roles = ("user", "assistant")
  return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_rewrite_begins_a_row():
  record = Record(Renderer(T), (T.end,))
  said_0, _ = ask(record, conversation("do it"), [*b"ok", T.end])
  assert said_0 == {"role": "assistant", "content": "ok"}
  _, on = ask(record, conversation("do it", "ok", "and that"), [*b"so", T.end])
  _, other = ask(record, conversation("do it!", "ok", "and that"), [*b"no", T.end])
  assert (on.parent, other.parent) == (0, None)
  t = finish(record)
  assert t.row_starts == (0, len(on.context) + 3)
  assert [turn.action for turn in t.turns] == ["ok<|end|>", "so<|end|>", "no<|end|>"]
  assert [turn.observation for turn in t.turns] == ["and that", "", ""]


def test_conversations_take_turns():
  """A side call between two turns; the second turn goes on from the first, in a row of its own."""
  record = Record(Renderer(T), (T.end,))
  ask(record, conversation("main"), [*b"a", T.end])
  ask(record, conversation("title?"), [*b"t", T.end])
  _, call = ask(record, conversation("main", "a", "more"), [*b"b", T.end])
  assert call.parent == 0
  t = finish(record)
  assert len(t.row_starts) == 3 and [sampled(t, k)[0] for k in range(3)] == [*b"atb"]


def test_the_longest_conversation_wins():
  record = Record(Renderer(T), (T.end,))
  ask(record, conversation("x"), [*b"1", T.end])
  ask(record, conversation("x", "1", "y"), [*b"2", T.end])
  # A retry of the second turn goes on from the first; the third from the second.
  assert record.read(conversation("x", "1", "z"), ()).parent == 0
  assert record.read(conversation("x", "1", "y", "2", "z"), ()).parent == 1
  assert record.read(conversation("x", "1", "y", "3", "z"), ()).parent == 0
  assert record.read(conversation("x", "1", "y"), (SHELL,)).parent is None  # other tools


@pytest.mark.parametrize("kept", [True, False])
def test_reasoning_may_be_dropped_but_not_changed(kept):
  record = Record(Renderer(T), (T.end,))
  ask(record, conversation("x"), [*b"1", T.end])
  call = record.log[0]
  call.history[-1] = call.history[-1]._replace(reasoning="because")
  back = {"role": "assistant", "content": "1"} | ({"reasoning_content": "because"} if kept else {})
  messages = [*conversation("x"), back, *conversation("y")]
  assert record.read(messages, ()).parent == 0
  messages[1] = back | {"reasoning_content": "why not"}
  assert record.read(messages, ()).parent is None


def test_calls_without_a_reply_are_left_out_with_what_follows():
  record = Record(Renderer(T), (T.end,))
  ask(record, conversation("x"), [*b"1", T.end])
  record.begin(record.read(conversation("never answered"), ()))
  ask(record, conversation("x", "1", "y"), [*b"2", T.end])
  assert finish(record).num_chunks == 1


def test_ids_of_calls_follow_from_their_place():
  record = Record(Renderer(T), (T.end,))
  for k in range(2):
    message, _ = ask(record, conversation(f"x{k}"), [T.call, *b"sh ls", T.end], (SHELL,))
    (call,) = message["tool_calls"]
    assert call["id"] == f"call_{k}_0"
    assert json.loads(call["function"]["arguments"]) == {"command": "ls"}
