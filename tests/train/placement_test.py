"""A run's arrays on a mesh: what does not fit is refused by name, what fits trains the same."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome import models, rollout
from rome.train import placement
from rome.train.checkpoints import Checkpoints, tree_sha256
from rome.train.config import ConfigError, ExpertsConfig, MeshConfig, RLConfig, RunConfig
from rome.train.learner import Learner
from rome.train.record import origin
from rome.trajectory import Valid
from tests.trajectories import make

ONE = RunConfig(
  model="micro",
  row_length=160,
  rl=RLConfig(steps=4, batch=6, learning_rate=1e-3),
  experts=ExpertsConfig(batch=2),
  router_balance_weight=0.01,
)
BIG = MeshConfig(data=2, fsdp=2, expert=2)


def mesh_of(config):
  return placement.mesh_of(config, models.PRESETS[config.model])


def on(**sizes):
  return dataclasses.replace(ONE, mesh=MeshConfig(**sizes))


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"data": 0}, r"mesh.data must be at least 1, or -1 for the rest, got 0"),
    ({"fsdp": -2}, r"mesh.fsdp must be at least 1"),
    ({"data": -1, "fsdp": -1}, r"only one size may be -1, got data and fsdp"),
  ],
)
def test_sizes_that_cannot_be(sizes, message):
  with pytest.raises(ValueError, match=message):
    MeshConfig(**sizes)


def test_exact_numerics_have_no_mesh():
  rl = dataclasses.replace(ONE.rl, micro_rows=32)
  with pytest.raises(ConfigError, match="config.mesh must be one device"):
    dataclasses.replace(ONE, numerics="exact", rl=rl, mesh=MeshConfig(fsdp=2))


def test_a_mesh_larger_than_the_machine():
  most = jax.device_count()
  with pytest.raises(ConfigError, match=f"config.mesh wants {2 * most} .*, and there are {most}"):
    Learner(on(data=2 * most))
  with pytest.raises(ConfigError, match=f"wants {2 * most} devices .*fsdp={2 * most}"):
    Learner(on(fsdp=2 * most, data=-1))


def test_one_device_has_no_mesh():
  assert mesh_of(ONE) is None
  assert "data" not in origin(ONE)["device"]
  state = Learner(ONE).fresh()
  assert placement.local(state.params) == state.params  # the arrays themselves


@pytest.mark.devices8
@pytest.mark.parametrize(
  ("config", "message"),
  [
    (on(data=3, fsdp=-1), r"config.sft.micro_rows must be a multiple of 6 .*, got 8"),
    (on(tensor=2), r"config.mesh: model.num_key_value_heads 1 does not split over tensor=2"),
    (on(context=8), None),
    (on(expert=8), r"config.mesh: model.num_experts 4 does not split over expert=8"),
  ],
)
def test_a_mesh_that_does_not_divide(config, message):
  if message is None:
    assert mesh_of(config).shape["context"] == 8
  else:
    with pytest.raises(ConfigError, match=message):
      mesh_of(config)


def batch_of(seed, version=0):
  rng = np.random.default_rng(seed)
  made = []
  for i in range(6):
    lengths = [(int(rng.integers(2, 20)), int(rng.integers(2, 20))) for _ in range(3)]
    t = make(f"t{i % 3}#{i}", lengths, Valid(float(i % 2)))
    tokens = rng.integers(0, 256, len(t.tokens)).astype(np.int32)
    logps = np.where(t.call_ids >= 0, -rng.random(len(tokens)) - 5, 0).astype(np.float32)
    versions = np.full(t.num_chunks, version, np.int32)
    made.append(dataclasses.replace(t, tokens=tokens, logps=logps, versions=versions))
  return made


def train(config):
  """Metrics of two IPA updates, the second with kept weights, and the state after them."""
  learner, rows = Learner(config), []
  state = learner.reinforcing(learner.fresh())
  for step in range(2):
    played = batch_of(step, step)
    kept = {step: state.params} if step else None
    state, row, _ = learner.reinforce(state, played, batch_of(9)[1::2], step, kept)
    rows.append(row)
  return rows, state


@pytest.mark.slow
@pytest.mark.devices8
def test_updates_on_a_mesh_are_those_of_one_device(tmp_path):
  """And so is what comes back from a checkpoint, whatever the layout on either side."""
  wanted, state = train(ONE)
  config = dataclasses.replace(ONE, mesh=BIG)
  rows, laid_out = train(config)
  for row, want in zip(rows, wanted, strict=True):
    assert row.keys() == want.keys()
    for name in ("loss", "grad_norm"):
      assert row[name] == pytest.approx(want[name], rel=1e-5), name
  mesh = mesh_of(config)
  kernels = laid_out.params["layers_0"]["mlp"]["gate_up_proj"]
  assert len(kernels.sharding.device_set) == 8
  assert math.prod(kernels.addressable_shards[0].data.shape) * 4 == math.prod(kernels.shape)
  assert "data=2 fsdp=2 expert=2" in origin(config)["device"] and mesh.size == 8
  alone = placement.local(laid_out.params)
  assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(alone))
  assert tree_sha256(alone) == tree_sha256(laid_out.params) != tree_sha256(state.params)

  store = rollout.ExpertStore(3, 8).arrays()
  checkpoints = Checkpoints(tmp_path, 2)
  checkpoints.save(1, laid_out, store, {"phase": "rl"})
  checkpoints.wait()
  for learner in (Learner(ONE), Learner(on(data=2))):
    like = learner.fresh()
    back, _, _ = checkpoints.restore(like, store)
    assert jax.tree.map(lambda x: x.sharding, back) == jax.tree.map(lambda x: x.sharding, like)
    assert tree_sha256(back.params) == tree_sha256(laid_out.params)
    assert jax.random.bits(placement.local(back.key)) == jax.random.bits(jax.random.key(ONE.seed))


@pytest.mark.devices8
def test_rows_lie_where_the_mesh_says():
  assert models.sharding.in_use() is False
  batch = Learner(ONE)._pack(batch_of(0), [], 0, ONE.rl)
  assert len(placement.on_devices([batch])[0].tokens.devices()) == 1
  with placement.Placement(on(data=2, context=4), models.PRESETS["micro"]).use():
    (placed,) = placement.on_devices([batch])
  assert placed.old_logp is None
  assert placed.tokens.addressable_shards[0].data.shape == (4, 40)
  assert placed.returns.addressable_shards[0].data.shape == (4, batch.returns.shape[1])
  assert jnp.array_equal(placed.tokens, batch.tokens)
