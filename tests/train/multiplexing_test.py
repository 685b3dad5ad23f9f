"""Devices that turn from rollout to training and back change nothing but the time it takes.

A loop one update off policy: batch k + 1 is sampled under the weights that batch k is trained from.
"""

import concurrent.futures as cf
import dataclasses

import jax
import numpy as np
import pytest

from rome import ipa, models
from rome.envs import generate
from rome.models import sharding
from rome.rollout import EnginePool, Episode, Member, Request, pack
from rome.rollout.recorder import Recorder
from rome.train import state as state_lib
from rome.train.config import StageConfig
from rome.train.step import ipa_step
from rome.trajectory import Valid

pytestmark = [pytest.mark.slow, pytest.mark.devices8]

CONFIG = models.PRESETS["micro"]
SAMPLING = models.Sampling(temperature=0.9)
IPA = ipa.IPAConfig(gamma=0.9, failure_reward=-1.0, lambda_il=0.0)
BATCH, UPDATES, TURNS, REPLY, ROW = 16, 3, 3, 20, 96
STAGE = StageConfig(steps=9, batch=BATCH, learning_rate=1e-2, warmup=0)
OPTIMIZER = state_lib.make_optimizer(STAGE)
KEY = jax.random.key(5)
TASK = generate("count", 0)
TRAINERS = 4  # the last ones
STOPS = tuple(range(8))  # one in 33 tokens


class Episodes:
  """A batch of episodes: replies and made-up answers to them, in turn."""

  def __init__(self, pool, number):
    self.pool, self.version = pool, pool.version
    self.open, self.done = {}, {}
    for instance in range(number * BATCH, (number + 1) * BATCH):
      rng = np.random.default_rng(instance)
      self.ask(instance, Recorder(), rng.integers(0, 256, 9).tolist())

  def ask(self, instance, record, context):
    record.context(context)
    request = Request(
      tuple(record.tokens), REPLY, SAMPLING, key=(instance, record.calls), stop_tokens=STOPS
    )
    self.open[self.pool.submit(request)] = instance, record

  def step(self):
    for reply in (update.reply for update in self.pool.step() if update.reply):
      instance, record = self.open.pop(reply.id)
      assert reply.version == self.version
      record.reply(reply.tokens, reply.logps, reply.version)
      if record.calls < TURNS:
        self.ask(instance, record, [sum(reply.tokens) % 256, 7])
        continue
      episode = Episode(f"t#{instance}", TASK, Member(instance, 0))
      reward = Valid(float(sum(record.tokens) % 2))
      assert instance not in self.done
      self.done[instance] = record.finish(episode, None, reward, "submitted")

  def trajectories(self):
    assert not self.open
    return [self.done[instance] for instance in sorted(self.done)]


def train(state, trajectories, mesh):
  batch = pack(
    trajectories, IPA, 0, row_length=ROW, max_chunks=TURNS, rows_multiple=BATCH, pad=0,
    share_rows=False,
  )  # fmt: skip
  rows = jax.sharding.NamedSharding(mesh, sharding.axes_spec(("batch",), mesh.axis_names))
  with jax.set_mesh(mesh):
    state, metrics = ipa_step(
      state, jax.device_put(batch, rows), config=CONFIG, sampling=SAMPLING, ipa_config=IPA,
      optimizer=OPTIMIZER, micro_rows=BATCH, num_trajectories=BATCH,
    )  # fmt: skip
  return state, metrics


def run(multiplexed):
  """All trajectories, the final parameters, and how many requests moved."""
  devices = jax.devices()
  freed = devices[-TRAINERS:]
  mesh = sharding.make_mesh(devices=freed)
  serving = devices if multiplexed else devices[:-TRAINERS]
  # Shapes of tests/rollout/engine/pool_test.py: what that compiled serves here too.
  pool = EnginePool(
    CONFIG, serving, slots=3, max_length=ROW, steps=3, prefill_tokens=32, backend="native"
  )
  state = state_lib.init_state(CONFIG, OPTIMIZER, 3)
  state = dataclasses.replace(
    state,
    params=jax.device_put(state.params, sharding.param_shardings(mesh, state.params)),
    opt_state=jax.device_put(state.opt_state, sharding.param_shardings(mesh, state.opt_state)),
    step=jax.device_put(state.step, jax.sharding.NamedSharding(mesh, jax.P())),
  )
  played, moved = [], 0
  with cf.ThreadPoolExecutor(1) as trainer:
    for k in range(UPDATES + 1):
      pool.publish(state.params, k, KEY)
      episodes = Episodes(pool, k)
      update = None
      if multiplexed:
        while len(episodes.done) < BATCH // 4:
          episodes.step()
      if k:
        if multiplexed:
          moved -= pool.stats.waiting
          pool.shrink(freed)
          moved += pool.stats.waiting
        update = trainer.submit(train, state, played[-1], mesh)
      while episodes.open:
        episodes.step()
        if update and update.done() and multiplexed and len(pool.serving) < len(devices):
          pool.expand(freed)
      played.append(episodes.trajectories())
      if update:
        state, metrics = update.result()
        if k == 1:  # the only update on policy: the learner agrees on what was sampled
          assert metrics["mismatch_max"] < 1e-4
      if len(pool.serving) < len(serving):
        pool.expand(freed)
  return played, state.params, moved


def test_a_multiplexed_loop_equals_one_with_a_static_split():
  (batches, params, moved), (want_batches, want_params, _) = run(True), run(False)
  assert moved >= UPDATES
  for batch, want_batch in zip(batches, want_batches, strict=True):
    assert len(batch) == BATCH
    for got, want in zip(batch, want_batch, strict=True):
      assert got.id == want.id and got.reward == want.reward
      np.testing.assert_array_equal(got.tokens, want.tokens)
      assert got.logps.tobytes() == want.logps.tobytes()
      np.testing.assert_array_equal(got.versions, want.versions)
  start = state_lib.init_state(CONFIG, OPTIMIZER, 3).params
  assert not np.array_equal(jax.tree.leaves(params)[0], jax.tree.leaves(start)[0])
  for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(want_params), strict=True):
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
