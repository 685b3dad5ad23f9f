"""Whatever skills are on: contexts only grow but by a rewrite, and counts are exact."""

import pathlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rome.agent.context import Context
from rome.agent.executor import Executor
from rome.agent.loop import Limits, Loop, drive
from rome.agent.model import ModelReply, ModelSettings
from rome.agent.skills import Compress, Detect, Environment, Lossless, Recall, Remind, Spill
from rome.agent.tools.builtin import builtin_tools
from rome.text import Tokenizer
from rome.text.render import Renderer
from tests.agent.skills.places import BYTES, call

GOLDENS = pathlib.Path(__file__).parents[2] / "text" / "goldens"
SYSTEM, OBJECTIVE = "Be brief.", "The objective <|end|> is <|im_end|> here."
PARTS = ("spill", "lossless", "compress", "summary", "remind", "detect", "environment", "recall")


def thinking():
  tokenizer = Tokenizer.from_dir(GOLDENS / "tokenizer")
  source = (GOLDENS / "templates" / "thinking.jinja").read_text()
  tokenizer.chat_templates = {"default": source}
  return tokenizer


TOKENIZERS = {"byte": (BYTES, "<|end|>"), "thinking": (thinking(), "<|im_end|>")}


CALL = st.one_of(
  st.builds(lambda p: call("read", path=p), st.sampled_from(["a", "b", "none"])),
  st.builds(
    lambda p, n: call("write", path=p, content=f"line {n}\n" * n),
    st.sampled_from(["a", "b"]),
    st.sampled_from([1, 40]),
  ),
  st.builds(lambda n: call("shell", command=f"seq {n}"), st.sampled_from([1, 90, 400])),
  st.builds(lambda w: call("recall", query=w), st.sampled_from(["line", "objective"])),
  st.just(call("nothing")),
)
REPLY = st.one_of(
  st.builds(lambda c: ("", (c,), "stop"), CALL),
  st.builds(lambda c, d: ("<think>\nso\n</think>\n\nI look", (c, d), "stop"), CALL, CALL),
  st.builds(lambda t: (t, (), "length"), st.sampled_from(["cut", "<think>on and on"])),
)
# What can go wrong behind a rewrite is what matters: most examples may have one.
ON = st.builds(
  lambda on, compress: on | ({"compress"} if compress else set()),
  st.sets(st.sampled_from(PARTS)),
  st.sampled_from([True, True, False]),
)
SUMMARY = st.sampled_from(["", "<think>only that</think>", "a was read", "far too long " * 300])


class Policy:
  """Plays replies, and checks that each request is what a row by hand would be.

  Attributes:
    rows: requests of each row.
  """

  def __init__(self, tokenizer, end, replies, summaries):
    self.tokenizer, self.end = tokenizer, tokenizer.specials[end]
    self.renderer = Renderer(tokenizer)
    self.replies, self.summaries = list(replies), summaries
    self.before, self.rows, self.row = None, [], -1

  def complete(self, request):
    assert list(request.ids) == self._by_hand(request)
    assert self.context.tokens() == len(request.ids)
    assert len(request.ids) + request.settings.max_tokens <= self.context.limit
    well_formed(request.messages)
    if request.purpose == "summary":
      reply = (self.summaries, (), "stop")
    else:
      reply = self.replies.pop(0) if self.replies else ("done", (), "stop")
    ids = tuple(self.tokenizer.encode(reply[0] + "".join(c.arguments for c in reply[1])))
    if reply[2] == "stop":
      ids += (self.end,)
    self.before = request, ids
    return ModelReply(*reply, ids=ids)

  def _by_hand(self, request):
    if self.row != self.context.row:
      self.row, rows = self.context.row, self.rows
      rows.append([request])
      return self.renderer.prompt(request.messages, request.tools)
    self.rows[-1].append(request)
    old, sampled = self.before
    new = request.messages[len(old.messages) + 1 :]
    return [*old.ids, *sampled, *self.renderer.extend(new, request.tools, sampled[-1])]


def well_formed(messages):
  assert messages[0] == {"role": "system", "content": SYSTEM}
  assert {"role": "user", "content": OBJECTIVE} in messages
  waiting = []
  for message in messages:
    if message["role"] == "tool":
      assert message["tool_call_id"] == waiting.pop(0)
    else:
      assert not waiting
      waiting = [c["id"] for c in message.get("tool_calls", ())]
  assert not waiting and messages[-1]["role"] != "assistant"


def assemble(place, on, space, tokenizer):
  """Loop and context with these parts, and so many tokens beside the first prompt."""
  recall = Recall(place)
  basics = [tool for tool in builtin_tools(place) if tool.name in ("read", "write", "shell")]
  environment = Environment(place)
  executor = Executor(
    [*basics, recall.tool()] if "recall" in on else basics,
    [environment.gate],
    [Spill(place, 500, 200)] if "spill" in on else [],
  )
  lossless = Lossless(place, executor.tools, 100, recent=1) if "lossless" in on else None
  parts = {
    "lossless": lossless,
    "compress": Compress(
      summary="summary" in on,
      turns=2,
      lossless=lossless,
      todo=lambda: "[ ] a",
      archive=recall.archive,
    ),
    "remind": Remind(3, todo=lambda: "[ ] a"),
    "detect": Detect(2, 2),
    "environment": environment,
  }
  renderer = Renderer(tokenizer)
  first = renderer.prompt([{"role": "user", "content": SYSTEM + OBJECTIVE}], executor.schemas())
  limit = len(first) + space
  context = Context(ModelSettings("m", 150), executor.schemas(), limit, renderer)
  skills = [skill for name, skill in parts.items() if name in on]
  return Loop(context, executor, Limits(turns=20), skills, SYSTEM), context


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(
  max_examples=12,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
  replies=st.lists(REPLY, min_size=5, max_size=14),
  on=ON,
  summaries=SUMMARY,
  space=st.sampled_from([900, 1400, 2500]),
)
def test_rows_grow_and_rewrites_lose_nothing_they_must_keep(
  place, name, replies, on, summaries, space
):
  tokenizer, end = TOKENIZERS[name]
  loop, context = assemble(place, on, space, tokenizer)
  policy = Policy(tokenizer, end, replies, summaries)
  policy.context = context
  outcome = drive(loop.run(OBJECTIVE), policy)
  assert outcome.reason in ("answered", "max_turns", "context_full", "loop_detected")
  if "compress" not in on:
    assert context.row == 0
  elif (
    len(policy.rows[0][0].ids) < context.limit * 0.7
  ):  # it makes room, whatever the policy writes
    assert outcome.reason != "context_full"
