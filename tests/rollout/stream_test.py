"""A stream: fresh batches while training goes on, nothing lost, nothing doubled."""

import random
import threading
import time

import gymnasium
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome import models
from rome.agent import Agent
from rome.envs import SandboxError
from rome.envs.task import Task
from rome.rollout import (
  Engine,
  EpisodeRunner,
  Grouping,
  Patience,
  Snapshot,
  TooManyInvalid,
)
from rome.text import ByteTokenizer

CONFIG = models.PRESETS["micro"]
T = ByteTokenizer()
KEY = jax.random.key(4)
TURNS = 3


class Words(gymnasium.Env):
  """A game without a sandbox: say anything `TURNS` times, after delays that `delay` gives."""

  def __init__(self, task, delay):
    self._task, self._delay, self._turns = task, delay, 0

  def reset(self, **kwargs):
    time.sleep(self._delay())
    self._turns = 0
    return f"say {self._task.id}", {}

  def step(self, action):
    time.sleep(self._delay())
    self._turns += 1
    ended = self._turns == TURNS
    # By the policy's words, so that groups differ in what they earn.
    reward = float(ended and sum(map(ord, action)) % 3 > 0)
    return f"turn {self._turns}", reward, ended, False, {}


class Player(Agent):
  """Plays whatever the untrained model says."""

  def act(self, reply):
    return super().act([T.call, *T.encode(f"sh {sum(reply)}"), T.end])


def task(number):
  return Task(f"words/{number}", "words", f"say {number}", {}, "true")


@pytest.fixture(scope="module")
def params():
  """Weights of several versions."""
  made = jax.jit(models.init_params, static_argnums=0)(CONFIG, jax.random.key(0))
  return [jax.tree.map(lambda x, k=k: x * (1 + 0.05 * k), made) for k in range(12)]


@pytest.fixture(scope="module")
def engine():
  return Engine(CONFIG, slots=4, max_length=192, stop_tokens=(T.end,), steps=4)


@pytest.fixture
def make_runner(engine):
  runners = []

  def make(delay=lambda: 0.0, wrap=lambda env, task: env, cap=0.5):
    runners.append(
      EpisodeRunner(
        engine,
        lambda one: Player(wrap(Words(one, delay), one), T, "", TURNS),
        models.Sampling(),
        max_reply=6,
        invalid_cap=cap,
        patience=Patience(reset=20.0, step=20.0, close=5.0, first_delay=0.01),
      )
    )
    return runners[-1]

  yield make
  for runner in runners:
    runner.close()


def same(a, b):
  assert [t.id for t in a] == [t.id for t in b]
  for x, y in zip(a, b, strict=True):
    assert (x.reward, x.end_reason, x.turns) == (y.reward, y.end_reason, y.turns)
    for name in ("tokens", "call_ids", "logps", "versions"):
      assert getattr(x, name).tobytes() == getattr(y, name).tobytes(), (x.id, name)


def jitter(seed, longest):
  """Delays in [0, longest], most of them short; for any thread."""
  rng, lock = random.Random(seed), threading.Lock()

  def draw():
    with lock:
      return longest * rng.random() ** 4

  return draw


@pytest.mark.parametrize("grouping", [Grouping(), Grouping(size=2), Grouping(size=2, refills=99)])
def test_without_staleness_it_gives_the_batches_of_a_synchronous_run(make_runner, params, grouping):
  """Whatever the timing; with refills as long as every uniform group can be replaced."""
  updates, groups, instance = 3, 3, 10
  runner = make_runner(jitter(0, 0.02))
  wanted = []
  for v in range(updates):
    wanted.append(runner.run(params[v], KEY, v, task, instance, groups, grouping))
    instance += wanted[-1][1].instances
  runner = make_runner(jitter(1, 0.02))
  with runner.stream(KEY, task, Snapshot(10), grouping, groups, 0, updates) as stream:
    for v in range(updates):
      stream.publish(params[v], v)
      batch, stats = stream.fetch()
      same(batch, wanted[v][0])
      for name in ("instances", "finished", "succeeded", "filtered", "env_steps", "dropped"):
        assert getattr(stats, name) == getattr(wanted[v][1], name), name
    assert stream.snapshot() == Snapshot(instance)


@given(
  seed=st.integers(0, 1000),
  max_staleness=st.integers(0, 3),
  size=st.integers(1, 2),
  redundancy=st.integers(0, 1),
  refills=st.integers(0, 2),
  restart=st.integers(1, 6),
)
@settings(max_examples=25, deadline=None, database=None)
@pytest.mark.slow
def test_no_sample_is_staler_than_allowed_and_none_is_lost_or_doubled(
  engine, params, seed, max_staleness, size, redundancy, refills, restart
):
  """Delays are long beside training, so that groups are overtaken; one restart on the way."""
  groups, updates, first = 2, 6, 100
  rng = random.Random(seed)
  grouping = Grouping(size, redundancy, refills if size > 1 else 0)
  runner = EpisodeRunner(
    engine,
    lambda one: Player(Words(one, jitter(seed, 0.03)), T, "", TURNS),
    models.Sampling(),
    max_reply=6,
    invalid_cap=0.0,
  )
  trained, ages, counts = [], [], {"instances": 0, "filtered": 0, "dropped": 0}
  stands = Snapshot(first)
  try:
    for part in (range(min(restart, updates)), range(min(restart, updates), updates)):
      left = updates - part.start
      with runner.stream(KEY, task, stands, grouping, groups, max_staleness, left) as stream:
        for v in part:
          stream.publish(params[v], v)
          batch, stats = stream.fetch()
          assert len(batch) == groups * size
          for t in batch:
            assert (np.diff(t.versions) >= 0).all() and len(t.versions) == TURNS
            ages += (v - t.versions).tolist()
          trained += [t.id for t in batch]
          for name in counts:
            counts[name] += getattr(stats, name)
          time.sleep(rng.random() * 0.03)
        stands = stream.snapshot()
  finally:
    runner.close()
  assert max(ages) <= max_staleness
  assert len(trained) == len(set(trained)) == updates * groups * size
  instances = {int(id.rpartition("#")[2].partition(".")[0]) for id in trained}
  buffered = {int(t.id.rpartition("#")[2].partition(".")[0]) for t in stands.buffer}
  # Every instance was trained on, replaced, dropped, or is in the last snapshot.
  assert not instances & buffered and not (instances | buffered) & set(stands.open)
  taken = stands.instance - first
  rest = taken - len(instances) - len(buffered) - len(stands.open)
  replaced = counts["filtered"] + counts["dropped"]
  assert replaced <= rest if grouping.refills else replaced == rest


def test_what_others_overtake_is_dropped_counted_and_replaced(make_runner, params):
  """The first group waits until two updates are through; the third can no longer use it."""
  gate = threading.Event()

  class Late(gymnasium.Wrapper):
    def step(self, action):
      if self.env.unwrapped._turns == 1:  # its first chunk is of version 0
        assert gate.wait(20)
      return self.env.step(action)

  runner = make_runner(wrap=lambda env, one: Late(env) if one.id == "words/0" else env)
  with runner.stream(KEY, task, Snapshot(0), Grouping(), 2, 1, updates=4) as stream:
    rows = []
    for v in range(4):
      if v == 2:
        gate.set()
        while "words/0#0" not in {t.id for t in stream.snapshot().buffer}:
          time.sleep(0.01)
      stream.publish(params[v], v)
      rows.append(stream.fetch())
    assert stream.snapshot() == Snapshot(9)
  assert [stats.dropped for _, stats in rows] == [0, 0, 1, 0]
  ids = [t.id for batch, _ in rows for t in batch]
  assert sorted(ids) == [f"words/{i}#{i}" for i in range(1, 9)]


def test_a_reply_that_new_weights_interrupt_is_sampled_by_these_alone(params):
  """Its bits are those that the new weights give for the same context."""
  engine = Engine(CONFIG, slots=1, max_length=384, stop_tokens=(T.end,), steps=1)
  runner = EpisodeRunner(
    engine,
    lambda one: Player(Words(one, lambda: 0.0), T, "", TURNS),
    models.Sampling(),
    max_reply=64,  # long enough to be met while it runs
    invalid_cap=0.0,
  )
  try:
    alone, _ = runner.run(params[5], KEY, 1, task, 0, 1)
    with runner.stream(KEY, task, Snapshot(0), Grouping(), 1, 1, updates=2) as stream:
      stream.publish(params[0], 0)
      before = engine.stats.sampled_tokens
      while engine.stats.sampled_tokens < before + 3:
        time.sleep(0.0001)
      stream.publish(params[5], 1)
      batch, stats = stream.fetch()
  finally:
    runner.close()
  assert batch[0].versions.tolist() == [1] * TURNS
  same(batch, alone)
  assert stats.sampled_tokens >= (batch[0].call_ids >= 0).sum() + 3


def test_what_ends_the_producer_is_raised_where_the_trainer_waits(make_runner, params):
  class Refusing(gymnasium.Wrapper):
    def step(self, action):
      raise SandboxError("gone")

  runner = make_runner(wrap=lambda env, one: Refusing(env), cap=0.5)
  with runner.stream(KEY, task, Snapshot(0), Grouping(), 4, 1, updates=4) as stream:
    stream.publish(params[0], 0)
    with pytest.raises(TooManyInvalid, match="3 episodes .*invalid_cap=0.5.*gone"):
      stream.fetch()
    with pytest.raises(TooManyInvalid):
      stream.publish(params[1], 1)
  assert not any(thread.name == "rollout" for thread in threading.enumerate())
  # The runner and its engine serve on.
  batch, _ = make_runner().run(params[0], KEY, 0, task, 0, 2)
  assert len(batch) == 2


def test_weights_that_do_not_fit_are_refused_and_end_it(make_runner, params):
  runner = make_runner()
  with (
    runner.stream(KEY, task, Snapshot(0), Grouping(), 2, 1, updates=2) as stream,
    pytest.raises(ValueError, match="parameters of another model"),
  ):
    stream.publish({}, 0)
