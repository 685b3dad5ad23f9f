"""Devices that are the trainer's between a fetch and the next publication: nothing changes but who
generates.
"""

import random
import threading
import time

import jax
import pytest

from rome import models
from rome.rollout import (
  Engine,
  EnginePool,
  EpisodeRunner,
  Grouping,
  Snapshot,
  Timeline,
  ask_again,
  stream,
)
from tests.rollout.stream_test import CONFIG, KEY, TURNS, Player, T, Words, jitter, same, task
from tests.rollout.timeline_test import events

pytestmark = pytest.mark.devices8

SHAPE = {"max_length": 384, "stop_tokens": (T.end,), "steps": 1}
REPLY = 48  # long enough that devices are taken from under it
UPDATES, GROUPS, FIRST = 5, 3, 10


class Watched(EnginePool):
  """Counts requests that moved."""

  moved = 0

  def shrink(self, devices):
    waiting = self.stats.waiting
    super().shrink(devices)
    self.moved += self.stats.waiting - waiting


@pytest.fixture(scope="module")
def params():
  """Weights of several versions."""
  made = jax.jit(models.init_params, static_argnums=0)(CONFIG, jax.random.key(0))
  return [jax.tree.map(lambda x, k=k: x * (1 + 0.05 * k), made) for k in range(UPDATES)]


def make_runner(engine, delay=lambda: 0.0, **settings):
  return EpisodeRunner(
    engine,
    lambda one: Player(Words(one, delay), T, "", TURNS),
    models.Sampling(),
    max_reply=REPLY,
    invalid_cap=0.0,
    **settings,
  )


def make_pool():
  return Watched(CONFIG, jax.devices()[:3], slots=1, **SHAPE)


def one_engine():
  return Engine(CONFIG, slots=3, **SHAPE)


def lying_on(devices):
  return {id(x) for x in jax.live_arrays() if x.devices() & set(devices)}


@pytest.mark.slow
def test_without_staleness_batches_are_those_of_one_engine(params):
  runner, wanted = make_runner(one_engine()), []
  for v in range(UPDATES):
    wanted.append(runner.run(params[v], KEY, v, task, FIRST + v * GROUPS, GROUPS)[0])
  pool = make_pool()
  again = make_runner(pool, jitter(1, 0.01))
  grouping, lent = Grouping(), pool.devices[:2]
  with again.stream(
    KEY, task, Snapshot(FIRST), grouping, GROUPS, 0, UPDATES, lent=lent
  ) as produced:
    for v in range(UPDATES):
      produced.publish(params[v], v)
      assert pool.serving == pool.devices
      same(produced.fetch()[0], wanted[v])
      assert pool.serving == pool.devices[2:]
  assert pool.serving == pool.devices  # all generate again, for an evaluation
  same(again.run(params[0], KEY, 0, task, FIRST, GROUPS)[0], wanted[0])
  for one in (runner, again):
    one.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_requests_move_and_nothing_is_lost_doubled_or_changed(params, tmp_path, seed):
  """Every chunk is what one engine says under the weights of its version."""
  rng, pool = random.Random(seed), make_pool()
  timeline = Timeline(tmp_path / "timeline.json", pool.slots)
  runner = make_runner(pool, jitter(seed, 0.01), timeline=timeline)
  lent, trained = pool.devices[:2], []
  before = lying_on(lent)
  with runner.stream(
    KEY, task, Snapshot(FIRST), Grouping(2, 1), GROUPS, 1, UPDATES, lent=lent
  ) as produced:
    for v in range(UPDATES):
      produced.publish(params[v], v)
      batch, _ = produced.fetch()
      assert len(batch) == 2 * GROUPS
      trained += batch
      assert lying_on(lent) <= before
      time.sleep(rng.random() * 0.05)
  runner.close()
  timeline.close()
  assert pool.moved > 0 and pool.stats.running == pool.stats.waiting == 0
  assert len({t.id for t in trained}) == len(trained) == UPDATES * 2 * GROUPS
  engine = one_engine()
  for v in range(UPDATES):
    replies = ask_again(engine, params[v], KEY, trained, models.Sampling(), REPLY)
    for t, chunks in zip(trained, replies, strict=True):
      for k in range(TURNS):
        at = t.call_ids == k
        if t.versions[k] == v:
          assert t.tokens[at].tolist() == chunks[k].tokens, (t.id, k)
          assert t.logps[at].tolist() == pytest.approx(chunks[k].logps, abs=0), (t.id, k)
  told = [e["args"] for e in events(tmp_path / "timeline.json") if e["name"] == "devices"]
  turns = [{"generating": 3, "lent": 0}, {"generating": 1, "lent": 2}]
  assert told == turns * UPDATES + turns[:1]


def test_a_producer_that_hangs_is_told(params, monkeypatch):
  monkeypatch.setattr(stream, "_PATIENCE", 0.5)
  gate = threading.Event()

  def stuck(number):
    gate.wait(60)
    return task(number)

  runner = make_runner(one_engine())
  with (
    pytest.raises(TimeoutError, match="did not come round within 0.5 s"),
    runner.stream(KEY, stuck, Snapshot(0), Grouping(), 1, 1, updates=2) as produced,
  ):
    produced.publish(params[0], 0)
    produced.publish(params[1], 1)
  gate.set()
  runner.close()
