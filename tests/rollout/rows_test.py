"""Agents that rewrite their contexts: the record says what the engine was asked, row by row."""

import dataclasses

import jax
import numpy as np
import pytest

from rome import models
from rome.agent import NewRow
from rome.envs import TaskError, generate
from rome.rollout import (
  AgentConfig,
  Engine,
  EpisodeRunner,
  SandboxConfig,
  World,
  ask_again,
  custom,
  demonstrate,
)
from rome.rollout.starts import Boundaries, Divergent, Start
from rome.text import ByteTokenizer
from rome.trajectory import Valid
from tests.agents import Forgetful
from tests.rollout.episodes_test import Translated, same

CONFIG, SAMPLING = models.PRESETS["micro"], models.Sampling()
T = ByteTokenizer()
SLOTS, MAX_REPLY, CONTEXT = 3, 6, 192
KEY = jax.random.key(4)
TASKS = [generate("count", seed) for seed in range(6)]
SEEN = {}  # by task: the context of each reply, as its agent knows it


class Rewriting(Forgetful, Translated):
  """Plays real commands; a row has room for two turns or so."""

  budget = 130

  def begin(self):
    ids = super().begin()
    self._context = list(ids)
    self._seen = SEEN[self.env.unwrapped._task.id] = [tuple(ids)]
    return ids

  def act(self, reply):
    context = super().act(reply)
    if context is not None:
      new = isinstance(context, NewRow)
      self._context = list(context.ids) if new else [*self._context, *reply, *context]
      self._seen.append(tuple(self._context))
    return context


class Short(Forgetful):
  """For reference solutions."""

  budget = 80


@pytest.fixture(scope="module")
def params():
  return jax.jit(models.init_params, static_argnums=0)(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def world():
  agent = AgentConfig(context=CONTEXT, factory="tests.rollout.rows_test:Rewriting")
  with World(SandboxConfig(backend="bubblewrap"), agent, size=SLOTS) as made:
    yield made


@pytest.fixture(scope="module")
def teacher():
  agent = AgentConfig(context=CONTEXT, factory="tests.rollout.rows_test:Short")
  with World(SandboxConfig(backend="bubblewrap"), agent, size=SLOTS) as made:
    yield made


def engine():
  return Engine(CONFIG, slots=SLOTS, max_length=CONTEXT, stop_tokens=(T.end,), steps=4)


def play(params, make_agent, **settings):
  runner = EpisodeRunner(
    engine(), make_agent, SAMPLING, max_reply=MAX_REPLY, invalid_cap=0.5, **settings
  )
  try:
    return runner.run(params, KEY, 3, TASKS.__getitem__, 0, len(TASKS))[0]
  finally:
    runner.close()


@pytest.fixture(scope="module")
def played(params, world):
  return play(params, world.agent)


@pytest.mark.slow
def test_every_reply_stands_behind_the_context_that_its_agent_gave(played):
  assert max(len(t.rows) for t in played) > 1 and any(t.success for t in played)
  assert {t.end_reason for t in played} == {"submitted"}
  for t in played:
    assert t.num_chunks == len(t.turns) == len(SEEN[t.task_id])
    contexts = []
    for row in t.rows:
      tokens, calls = t.tokens[row.tokens], t.call_ids[row.tokens]
      for k in range(row.chunks.start, row.chunks.stop):
        contexts.append(tuple(tokens[: np.argmax(calls == k)].tolist()))
      assert len(tokens) <= CONTEXT and calls[0] == -1
    assert contexts == SEEN[t.task_id]


@pytest.mark.slow
def test_the_engine_says_the_same_again(params, played):
  again = ask_again(engine(), params, KEY, played, SAMPLING, MAX_REPLY)
  for t, replies in zip(played, again, strict=True):
    at = t.call_ids >= 0
    assert t.tokens[at].tolist() == [token for reply in replies for token in reply.tokens]
    logps = np.concatenate([np.array(reply.logps, np.float32) for reply in replies])
    assert t.logps[at].tobytes() == logps.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("room", [MAX_REPLY, MAX_REPLY - 1])
def test_a_rewritten_context_that_does_not_fit_ends_the_episode(params, world, played, room):
  class Verbose(Rewriting):
    """Its new rows leave as much room."""

    def act(self, reply):
      context = super().act(reply)
      return NewRow([T.end] * (CONTEXT - room)) if isinstance(context, NewRow) else context

  def make(task):
    agent = world.agent(task)
    return Verbose(agent.env, T, agent.system, agent.max_turns)

  done = play(params, make)
  several = {t.id for t in played if len(t.rows) > 1}
  assert several
  for t in (t for t in done if t.id in several):
    if room == MAX_REPLY:
      assert len(t.rows) > 1 and t.rows[1].tokens.stop - t.rows[1].tokens.start >= CONTEXT - room
    else:
      assert (t.end_reason, t.reward, len(t.rows)) == ("context_full", Valid(0.0), 1)


@pytest.mark.slow
def test_a_row_more_than_a_micro_batch_has_ends_the_episode(params, world, played):
  most = max(len(t.rows) for t in played)
  same(play(params, world.agent, max_rows=most), played)
  done = play(params, world.agent, max_rows=most - 1)
  for a, b in zip(done, played, strict=True):
    assert a.end_reason == ("submitted" if len(b.rows) < most else "context_full")
    assert a.row_starts == b.row_starts[: most - 1]


@pytest.mark.slow
def test_a_reward_of_ones_own_sees_the_rows(params, world, played):
  seen = {}

  def judge(trajectory):
    seen[trajectory.task_id] = trajectory
    return float(len(trajectory.rows))

  done = play(params, lambda task: custom.Rewarded(world.agent(task), task, judge))
  for a, b in zip(done, played, strict=True):
    assert a.reward == Valid(float(len(b.rows)))
    same([dataclasses.replace(a, reward=b.reward)], [b])
    assert seen[a.task_id].row_starts == b.row_starts
    np.testing.assert_array_equal(seen[a.task_id].tokens, b.tokens)


@pytest.mark.slow
def test_demonstrations(teacher):
  demos = demonstrate(TASKS, teacher, SLOTS)
  most = max(len(t.rows) for t in demos)
  assert most > 1 and all(t.success for t in demos)
  for t in demos:
    for row in t.rows:
      assert len(t.tokens[row.tokens]) <= CONTEXT and t.call_ids[row.tokens][0] == -1
  with pytest.raises(TaskError, match=f"takes {most} rows, .* has 1; raise sft.micro_rows and "):
    demonstrate(TASKS, teacher, 1, max_rows=1)


@pytest.mark.slow
def test_a_prefix_that_rewrites_its_context_is_no_start(teacher):
  """An expert that another agent played in one row."""
  demo = next(t for t in demonstrate(TASKS, teacher, 1) if len(t.rows) > 1)
  first = demo.rows[0]
  expert = dataclasses.replace(demo, row_starts=(0,))
  for chunks, fits in ((first.chunks.stop - 1, True), (first.chunks.stop, False)):
    agent = teacher.agent(next(task for task in TASKS if task.id == demo.task_id))
    try:
      start = Start(expert, chunks)
      if fits:
        assert Boundaries().begin(agent, start) == start.context
      else:
        with pytest.raises(Divergent):
          Boundaries().begin(agent, start)
    finally:
      agent.env.close()


def test_a_new_row_needs_a_context():
  with pytest.raises(ValueError, match="a NewRow without token ids"):
    NewRow([])
