"""Moments in host memory: they are there, and no bit of a run is another."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from rome import models, rollout
from rome.models import lora
from rome.train import optimise
from rome.train import state as state_lib
from rome.train.checkpoints import Checkpoints, tree_sha256
from rome.train.config import LoraConfig, MeshConfig, StageConfig
from rome.train.learner import Learner
from tests.train.placement_test import ONE, batch_of

SMALL = dataclasses.replace(ONE, rl=dataclasses.replace(ONE.rl, micro_rows=4))
STAGE = StageConfig(steps=9, batch=6, learning_rate=1e-2, warmup=0, weight_decay=0.1, clip_norm=0.1)


def kinds(tree):
  """Memories that arrays lie in, scalars left out."""
  return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


def held(kind):
  """Bytes of all live arrays in one kind of memory, a shard counted once for each device."""
  shards = [
    s.data for x in jax.live_arrays() if x.sharding.memory_kind == kind and not x.is_deleted()
    for s in x.addressable_shards
  ]  # fmt: skip
  return sum(s.nbytes for s in shards)


def train(config, state=None, steps=range(2)):
  """The state after updates of reinforcement learning."""
  learner = Learner(config)
  state = learner.reinforcing(learner.begin()) if state is None else state
  for step in steps:
    state, _, _ = learner.reinforce(state, batch_of(step, step), batch_of(9)[1::2], step)
  return state


def bits(state):
  return tree_sha256((state.params, state.opt_state, state.step))


def away(config, **changes):
  return dataclasses.replace(config, offload_optimizer=True, **changes)


def grads_like(params, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype)), params)


def test_pieces_are_the_optimiser():
  """Clipped AdamW of pieces is optax's own of the whole, up to rounding."""
  state = state_lib.init_state(models.PRESETS["micro"], state_lib.make_optimizer(STAGE), 0)
  ours, params = state_lib.make_optimizer(STAGE), state.params
  rate = STAGE.learning_rate
  theirs = optax.chain(
    optax.clip_by_global_norm(STAGE.clip_norm), optax.adamw(rate, 0.9, 0.95, weight_decay=0.1)
  )
  wanted, want_state, opt_state = params, theirs.init(params), state.opt_state
  for step in range(3):
    grads = grads_like(params, step)
    updates, want_state = jax.jit(theirs.update)(grads, want_state, wanted)
    wanted = optax.apply_updates(wanted, updates)
    params, opt_state = optimise.apply(ours, params, opt_state, grads, optax.tree.norm(grads))
  assert jax.tree.structure(params) == jax.tree.structure(wanted)
  for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  assert int(opt_state[1][0].count) == 3


def test_moments_leave_the_device_and_nothing_is_kept_twice():
  optimizer = state_lib.make_optimizer(STAGE)
  fresh = state_lib.init_state(models.PRESETS["micro"], optimizer, 0)
  size = sum(x.nbytes for x in jax.tree.leaves(fresh.params))
  device, host = held("device"), held("pinned_host")
  state = optimise.to_host(fresh)
  del fresh
  assert kinds(state.opt_state) == {"pinned_host"} and kinds(state.params) == {"device"}
  assert held("device") <= device - 2 * size + 1024 and held("pinned_host") == host + 2 * size
  before, grads = state, jax.device_put(grads_like(state.params), jax.devices()[0])
  norm = optax.tree.norm(grads)
  device = held("device")
  params, opt_state = optimise.apply(optimizer, state.params, state.opt_state, grads, norm)
  assert kinds(opt_state) == {"pinned_host"} and kinds(params) == {"device"}
  assert all(x.is_deleted() for x in jax.tree.leaves(grads))  # new weights took their memory
  moments = [x for x in jax.tree.leaves(before.opt_state) if x.ndim]
  assert all(x.is_deleted() for x in moments)
  assert not any(x.is_deleted() for x in jax.tree.leaves(before.params))
  assert held("device") <= device + 1024 and held("pinned_host") == host + 2 * size


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [LoraConfig(), LoraConfig(rank=2)])
def test_the_bits_are_the_same(adapters):
  config = dataclasses.replace(SMALL, lora=adapters)
  plain, other = train(config), train(away(config))
  assert kinds(plain.opt_state) == {"device"} and kinds(other.opt_state) == {"pinned_host"}
  assert bits(plain) == bits(other)
  assert lora.has_lora(other.params) == bool(adapters.rank)


@pytest.mark.slow
def test_a_run_may_change_it_when_it_goes_on(tmp_path):
  """Through a checkpoint, either way: it ends with the bits of a run that nothing interrupted."""
  whole = bits(train(SMALL, steps=range(3)))
  for name, first, second in (("there", SMALL, away(SMALL)), ("back", away(SMALL), SMALL)):
    half = train(first, steps=range(2))
    store = rollout.ExpertStore(3, 8).arrays()
    checkpoints = Checkpoints(tmp_path / name, 1)
    checkpoints.save(1, half, store, {})
    checkpoints.close()
    state, _, _ = checkpoints.restore(Learner(second).fresh(), store)
    assert kinds(state.opt_state) == {"pinned_host" if second.offload_optimizer else "device"}
    assert bits(train(second, state, steps=range(2, 3))) == whole


@pytest.mark.slow
@pytest.mark.devices8
def test_the_bits_are_the_same_on_a_mesh(tmp_path):
  mesh = dataclasses.replace(ONE, mesh=MeshConfig(data=2, fsdp=2, expert=2))
  plain, other = train(mesh), train(away(mesh))
  assert kinds(other.opt_state) == {"pinned_host"} and kinds(other.params) == {"device"}
  assert bits(plain) == bits(other)
  for x, y in zip(jax.tree.leaves(plain.opt_state), jax.tree.leaves(other.opt_state), strict=True):
    assert x.sharding.shard_shape(x.shape) == y.sharding.shard_shape(y.shape)
  store = rollout.ExpertStore(3, 8).arrays()
  checkpoints = Checkpoints(tmp_path, 1)
  checkpoints.save(1, other, store, {})
  checkpoints.close()
  for config in (away(mesh), away(ONE), ONE):
    state, _, _ = checkpoints.restore(Learner(config).fresh(), store)
    assert kinds(state.opt_state) == {"pinned_host" if config.offload_optimizer else "device"}
    assert bits(state) == bits(plain)
