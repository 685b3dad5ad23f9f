"""Updates: the same however they are cut, pure, in the right direction, and never with a NaN."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rome import ipa, models
from rome.rollout import pack
from rome.train import state as state_lib
from rome.train.config import StageConfig
from rome.train.step import ipa_step, sft_step
from rome.trajectory import Valid
from tests.trajectories import make

CONFIG = models.PRESETS["micro"]
# Trajectory means are the hardest to cut: their counts come from the whole batch.
IPA = ipa.IPAConfig(gamma=0.5, failure_reward=-1.0, lambda_il=0.0, normaliser="trajectory_mean")
SGD = optax.sgd(1.0)  # the parameters' change is minus the gradient
STAGE = StageConfig(steps=9, batch=6, learning_rate=1e-2, warmup=0)
ADAM = state_lib.make_optimizer(STAGE)
SHAPES = [[(4, 2), (1, 3)], [(2, 5), (2, 1)], [(3, 3)]]
SHAPES += [[(6, 1), (1, 1)], [(2, 9)], [(1, 2), (2, 3)]]
TRAJECTORIES = [
  make(f"t#{i}", chunks, Valid(float(i % 2)), logp=-5.5) for i, chunks in enumerate(SHAPES)
]


@functools.cache
def fresh(optimizer):
  return state_lib.init_state(CONFIG, optimizer, 3)


def start(optimizer=SGD):
  """Of its own optimiser's state, which an update takes over."""
  state = fresh(optimizer)
  return state.replace(opt_state=jax.tree.map(jnp.copy, state.opt_state))


def batch_of(trajectories=TRAJECTORIES, imitate=False):
  reinforced, experts = ([], trajectories) if imitate else (trajectories, [])
  return pack(
    reinforced, IPA, 0, row_length=12, max_chunks=2, rows_multiple=4, pad=256, experts=experts
  )


def reinforce(state, batch, *, optimizer=SGD, micro_rows=4, **settings):
  return ipa_step(
    state, batch, config=CONFIG, sampling=models.Sampling(), ipa_config=IPA,
    optimizer=optimizer, micro_rows=micro_rows, num_trajectories=len(TRAJECTORIES), **settings,
  )  # fmt: skip


def imitate(state, batch, *, optimizer=SGD, micro_rows=4, **settings):
  return sft_step(
    state, batch, config=CONFIG, optimizer=optimizer, micro_rows=micro_rows, **settings
  )


def leaves(state):
  return [np.asarray(x) for x in jax.tree.leaves(state.params)]


def same_bits(a, b):
  return all(x.tobytes() == y.tobytes() for x, y in zip(leaves(a), leaves(b), strict=True))


@functools.partial(jax.jit)
def score(params, batch):
  dense = models.Compute(experts="dense")
  logits = models.forward(CONFIG, params, batch.tokens, batch.segment_ids, batch.positions, dense)
  return models.token_logps(logits, batch.tokens, models.Sampling())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ipa", "sft"])
def test_micro_batches_change_nothing(kind):
  batch = batch_of(imitate=kind == "sft")
  assert len(batch.tokens) == 8
  update = reinforce if kind == "ipa" else imitate
  whole, metrics = update(start(), batch, micro_rows=8)
  assert not same_bits(whole, start())
  cut, cut_metrics = update(start(), batch, micro_rows=4)
  assert metrics.keys() == cut_metrics.keys()
  for name, value in metrics.items():
    assert cut_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
  for a, b in zip(leaves(whole), leaves(cut), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_ipa_metrics_are_those_of_the_batch():
  batch = batch_of()
  logp, entropy = score(start().params, batch)
  sampled = batch.chunk_ids >= 0
  _, metrics = reinforce(start(), batch)
  want = ipa.ipa_loss(logp, batch, IPA)[0]
  assert metrics["loss"] == pytest.approx(float(want), rel=1e-5)
  assert metrics["entropy"] == pytest.approx(float(entropy[sampled].mean()), rel=1e-5)
  mismatch = np.abs(np.asarray(logp) - batch.behavior_logp)[sampled]
  assert metrics["mismatch_mean"] == pytest.approx(mismatch.mean(), rel=1e-4)
  assert metrics["mismatch_max"] == pytest.approx(mismatch.max(), rel=1e-4)
  assert metrics["tokens"] == sampled.sum() and metrics["chunks"] == sum(map(len, SHAPES))


def test_ipa_raises_the_likely_and_lowers_the_failed():
  batch = batch_of()
  after, _ = reinforce(start(), batch)
  change = np.asarray(score(after.params, batch)[0] - score(start().params, batch)[0])
  slots = np.maximum(batch.chunk_ids, 0)
  positive = np.take_along_axis(batch.positive, slots, axis=1)
  sampled = batch.chunk_ids >= 0
  assert change[sampled & positive].mean() > 1e-4 > -1e-4 > change[sampled & ~positive].mean()


def test_sft_reads_the_marked_chunks_alone():
  batch = batch_of(imitate=True)
  batch = dataclasses.replace(batch, il_mask=batch.il_mask & (np.arange(2) == 0)[None])
  marked = batch.chunk_ids == 0
  logp = np.asarray(score(start().params, batch)[0])
  _, metrics = imitate(start(), batch)
  assert metrics["loss"] == pytest.approx(-logp[marked].mean(), rel=1e-5)
  assert metrics["accuracy"] == (logp[marked] > np.log(0.5)).mean()


@pytest.mark.slow
def test_sft_learns_its_batch():
  state, batch, losses = start(ADAM), batch_of(imitate=True), []
  for _ in range(25):
    state, metrics = imitate(state, batch, optimizer=ADAM)
    losses.append(metrics["loss"])
  assert losses[0] > 5 and losses[-1] < 0.7 * losses[0] and metrics["accuracy"] > 0
  assert int(state.step) == 25


def test_an_update_follows_from_its_inputs_and_leaves_the_parameters():
  state, batch = start(ADAM), batch_of()
  before = [x.copy() for x in leaves(state)]
  first, _ = reinforce(start(ADAM), batch, optimizer=ADAM)
  again, _ = reinforce(state, batch, optimizer=ADAM)
  assert same_bits(first, again) and not same_bits(first, state)
  assert all(a.tobytes() == b.tobytes() for a, b in zip(before, leaves(state), strict=True))
  assert (int(state.step), int(first.step)) == (0, 1)
  assert jax.random.key_data(first.key).tolist() == jax.random.key_data(state.key).tolist()
  # The moments are updated in place, which is what an update saves memory by; counts are not.
  assert all(x.is_deleted() for x in jax.tree.leaves(state.opt_state) if x.ndim)


@pytest.mark.slow
def test_a_learning_rate_of_zero_leaves_every_bit():
  optimizer = state_lib.make_optimizer(dataclasses.replace(STAGE, learning_rate=0.0))
  state = start(optimizer)
  for _ in range(2):
    state, metrics = reinforce(state, batch_of(), optimizer=optimizer)
    assert metrics["grad_norm"] > 0
  state, _ = imitate(state, batch_of(imitate=True), optimizer=optimizer)
  assert same_bits(state, start(optimizer)) and int(state.step) == 3


def test_the_gradient_norm_is_told_unclipped():
  clipped = state_lib.make_optimizer(dataclasses.replace(STAGE, clip_norm=1e-3))
  _, free = reinforce(start(ADAM), batch_of(), optimizer=ADAM)
  _, told = reinforce(start(clipped), batch_of(), optimizer=clipped)
  assert told["grad_norm"] == free["grad_norm"] > 1e-2
  update, _ = reinforce(start(), batch_of())
  changes = [a - b for a, b in zip(leaves(update), leaves(start()), strict=True)]
  norm = np.sqrt(sum((change**2).sum() for change in changes))
  assert norm == pytest.approx(free["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("kind", ["ipa", "sft"])
def test_nothing_that_is_not_finite_gets_in(kind):
  state = start(ADAM)
  before = [x.copy() for x in leaves(state)]
  if kind == "ipa":
    batch = batch_of()
    bad = dataclasses.replace(batch, returns=np.full_like(batch.returns, np.inf))
    with pytest.raises(FloatingPointError, match="update 0: .*loss.* not finite; the update was n"):
      reinforce(state, bad, optimizer=ADAM)
  else:
    poisoned = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    with pytest.raises(FloatingPointError, match="update 0: grad_norm, loss.* not finite"):
      imitate(poisoned, batch_of(imitate=True), optimizer=ADAM)
  assert all(a.tobytes() == b.tobytes() for a, b in zip(before, leaves(state), strict=True))
  assert int(state.step) == 0
  assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))


def test_warm_up_is_linear_and_starts_at_once():
  stage = dataclasses.replace(STAGE, learning_rate=1.0, warmup=4)
  rates = [float(state_lib.learning_rate(stage, count)) for count in range(6)]
  assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
  assert float(state_lib.learning_rate(STAGE, 0)) == pytest.approx(1e-2)


def test_a_new_stage_keeps_the_weights_and_forgets_the_rest():
  trained, _ = reinforce(start(ADAM), batch_of(), optimizer=ADAM)
  fresh = state_lib.restart_optimizer(trained, ADAM)
  assert same_bits(fresh, trained) and int(fresh.step) == 0
  for a, b in zip(
    jax.tree.leaves(fresh.opt_state), jax.tree.leaves(start(ADAM).opt_state), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_the_seed_decides_the_start():
  other = state_lib.init_state(CONFIG, SGD, 4)
  assert same_bits(state_lib.init_state(CONFIG, SGD, 3), start()) and not same_bits(other, start())


ROUTER = models.RouterLoss(balance=0.3, z=0.1)


@pytest.mark.slow
def test_router_metrics_are_those_of_the_batch():
  batch, states = batch_of(), jax.jit(models.hidden_states, static_argnums=0)
  arrays = batch.tokens, batch.segment_ids, batch.positions
  stats = states(CONFIG, start().params, *arrays)[1]
  rows = CONFIG.num_hidden_layers * int((batch_of().segment_ids != 0).sum())
  load, prob = (np.asarray(stats[name], np.float64) for name in ("load", "prob"))
  want = {
    "router_balance": CONFIG.num_experts * load.sum(0) @ prob.sum(0) / rows**2,
    "router_z": np.asarray(stats["z"]).sum() / rows,
    "expert_load_max": (load / load.mean(axis=1, keepdims=True)).max(),
    "expert_idle": (load == 0).mean(),
  }
  assert load.sum() == CONFIG.num_experts_per_tok * rows
  for update, batch in ((reinforce, batch_of()), (imitate, batch_of(imitate=True))):
    _, metrics = update(start(), batch)
    for name, value in want.items():
      assert metrics[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ipa", "sft"])
def test_the_losses_of_the_router_are_those_of_the_batch(kind):
  """However it is cut; and what they add to the gradient is theirs."""
  batch = batch_of(imitate=kind == "sft")
  update = reinforce if kind == "ipa" else imitate
  plain, told = update(start(), batch, micro_rows=8)
  whole, metrics = update(start(), batch, micro_rows=8, router_loss=ROUTER)
  cut, _ = update(start(), batch, micro_rows=4, router_loss=ROUTER)
  assert metrics["loss"] == pytest.approx(told["loss"], rel=1e-6)
  for a, b in zip(leaves(whole), leaves(cut), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)

  @jax.jit
  @jax.grad
  def theirs(params):
    arrays = batch.tokens, batch.segment_ids, batch.positions
    stats = models.hidden_states(CONFIG, params, *arrays)[1]
    rows = CONFIG.num_hidden_layers * (batch.segment_ids != 0).sum()
    load = jax.lax.stop_gradient(stats["load"]).sum(0) / rows
    balance = CONFIG.num_experts * jnp.dot(load, stats["prob"].sum(0) / rows)
    return ROUTER.balance * balance + ROUTER.z * stats["z"].sum() / rows

  added = jax.tree.map(jnp.subtract, plain.params, whole.params)  # SGD at rate 1
  for a, b in zip(jax.tree.leaves(added), jax.tree.leaves(theirs(start().params)), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6)
  router = added["layers_0"]["mlp"]["router"]
  assert np.abs(router).max() > 1e-4


@pytest.mark.slow
def test_adapters_train_alone():
  params = models.add_lora(CONFIG, start().params, jax.random.key(1), 2, 4.0, ["q_proj", "o_proj"])
  state = state_lib.restart_optimizer(dataclasses.replace(start(ADAM), params=params), ADAM)
  assert sum(x.size for x in jax.tree.leaves(state.opt_state)) < 0.2 * sum(
    x.size for x in leaves(state)
  )
  losses = []
  for _ in range(3):
    state, metrics = imitate(state, batch_of(imitate=True), optimizer=ADAM, micro_rows=4)
    losses.append(metrics["loss"])
  assert losses[2] < losses[1] < losses[0] and metrics["grad_norm"] > 0
  for path, value in jax.tree_util.tree_leaves_with_path(params):
    trains = path[-1].key in ("lora_a", "lora_b")
    now = functools.reduce(lambda tree, key: tree[key.key], path, state.params)
    assert (np.asarray(now).tobytes() == np.asarray(value).tobytes()) != trains, path
