"""Moments in host memory: they are there, and no bit of a run is another."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rome import models, rollout
from rome.models import lora
from rome.train import optimise
from rome.train.checkpoints import Checkpoints, tree_sha256
from rome.train.config import MeshConfig, StageConfig
from rome.train.placement import Placement
from rome.train.state import TrainState, make_optimizer
from tests.train.placement_test import BIG, ONE

pytestmark = pytest.mark.slow

MICRO = models.PRESETS["micro"]
STAGE = StageConfig(steps=9, batch=6, learning_rate=1e-2, warmup=0, weight_decay=0.1, clip_norm=0.1)
ADAM = make_optimizer(STAGE)


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


def bits(state):
  return tree_sha256((state.params, state.opt_state, state.step))


def filled(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def state_of(adapters=False, optimizer=ADAM):
  """A state of random numbers, which costs no compilation of a model."""
  key = jax.random.key(0)
  params = jax.tree.map(jnp.asarray, filled(jax.eval_shape(lambda: models.init_params(MICRO, key))))
  if adapters:
    params = models.add_lora(MICRO, params, key, 2, 32.0, ("q_proj", "k_proj"))
  trainable = lora.split(params)[0]
  zero = jnp.zeros((), jnp.int32)
  return TrainState(params=params, opt_state=optimizer.init(trainable), step=zero, key=key)


def update(state, count=2, optimizer=ADAM):
  """The state after updates by gradients of random numbers, which lie like the parameters."""
  for step in range(int(state.step), int(state.step) + count):
    trainable = lora.split(state.params)[0]
    grads = jax.tree.map(
      lambda x, like: jax.device_put(x, like.sharding if like.committed else None),
      filled(trainable, step),
      trainable,
    )
    norm = jax.jit(optax.tree.norm)(grads)
    params, opt_state = optimise.apply(optimizer, state.params, state.opt_state, grads, norm)
    state = dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1)
  return state


def test_pieces_are_the_optimiser():
  """Clipped AdamW of pieces is optax's own of the whole, up to rounding."""
  start = state_of()
  theirs = optax.chain(
    optax.clip_by_global_norm(STAGE.clip_norm),
    optax.adamw(STAGE.learning_rate, 0.9, 0.95, weight_decay=STAGE.weight_decay),
  )
  wanted, want_state = start.params, theirs.init(start.params)
  for step in range(3):
    updates, want_state = jax.jit(theirs.update)(filled(wanted, step), want_state, wanted)
    wanted = optax.apply_updates(wanted, updates)
  got = update(start, 3)
  assert jax.tree.structure(got) == jax.tree.structure(start)
  for x, y in zip(jax.tree.leaves(got.params), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  assert int(got.opt_state[1][0].count) == 3


@pytest.mark.parametrize("adapters", [False, True])
def test_the_bits_are_the_same_in_host_memory(adapters):
  plain, other = update(state_of(adapters)), update(optimise.to_host(state_of(adapters)))
  assert kinds(plain.opt_state) == {"device"} and kinds(other.opt_state) == {"pinned_host"}
  assert bits(plain) == bits(other) and bits(plain) != bits(state_of(adapters))
  assert lora.has_lora(other.params) == adapters


def test_moments_leave_the_device_and_nothing_is_kept_twice():
  """In a process of its own: live arrays are counted, and what other tests began may make some."""
  program = "from tests.train import optimise_test; optimise_test.count_memory()"
  command = [sys.executable, "-c", program]
  done = subprocess.run(command, capture_output=True, text=True, timeout=200)
  assert done.returncode == 0, done.stderr


def count_memory():
  device, host = held("device"), held("pinned_host")
  state = optimise.to_host(state_of())
  size = sum(x.nbytes for x in jax.tree.leaves(state.params))
  assert kinds(state.params) == {"device"}
  assert held("device") <= device + size + 1024 and held("pinned_host") == host + 2 * size
  before = state
  state = update(state, 1)
  assert all(x.is_deleted() for x in jax.tree.leaves(before.opt_state) if x.ndim)
  assert not any(x.is_deleted() for x in jax.tree.leaves(before.params))
  # Old weights and new ones, which took the memory of the gradient.
  assert held("device") <= device + 2 * size + 2048 and held("pinned_host") == host + 2 * size


def laid_out(config):
  """A state where a run of these settings has it."""
  start = state_of()
  numbers = jax.tree.map(np.asarray, (start.params, start.opt_state))
  key = start.key

  def make(params, opt_state):
    return TrainState(params=params, opt_state=opt_state, step=jnp.zeros((), jnp.int32), key=key)

  return Placement(config, MICRO).lay_out(make, *jax.tree.map(jnp.asarray, numbers))


@pytest.mark.parametrize(
  "mesh", [MeshConfig(), pytest.param(BIG, marks=pytest.mark.devices8)], ids=["one", "mesh"]
)
def test_a_run_may_change_it_through_a_checkpoint(mesh, tmp_path):
  """On one device and on a mesh: the arrays lie where the settings say, the bits are the same."""
  plain = dataclasses.replace(ONE, mesh=mesh)
  away = dataclasses.replace(plain, offload_optimizer=True)
  wanted, store = update(laid_out(plain), 3), rollout.ExpertStore(3, 8).arrays()
  for name, first, second in (("there", plain, away), ("back", away, plain), ("on", away, away)):
    half = update(laid_out(first), 2)
    assert kinds(half.opt_state) == {"pinned_host" if first.offload_optimizer else "device"}
    checkpoints = Checkpoints(tmp_path / name, 1)
    checkpoints.save(1, half, store, {})
    checkpoints.close()
    like = laid_out(second)
    state, _, _ = checkpoints.restore(like, store)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, like)
    assert kinds(state.opt_state) == {"pinned_host" if second.offload_optimizer else "device"}
    assert bits(update(state, 1)) == bits(wanted)
