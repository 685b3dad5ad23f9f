"""The baselines against the numpy oracle, on literals, and in the limits where they meet."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rome import ipa
from rome.ipa.estimators import ESTIMATORS, check_estimator
from tests.ipa import baselines_oracle, oracle

pytestmark = pytest.mark.slow

INF = float("inf")
CONFIGS = (
  ipa.IPAConfig(mask_upper=1.1),
  ipa.IPAConfig(
    normaliser="trajectory_sum", lambda_il=0.7, mask_lower=0.6, clip_lower=0.4, clip_upper=0.5
  ),
  ipa.IPAConfig(
    normaliser="chunk_mean", mask_upper=INF, lambda_rl=0.5, il_weight="policy", clip_lower=1.0
  ),
)
SUM = ipa.IPAConfig(gamma=1.0, normaliser="trajectory_sum", mask_upper=INF)
SHAPE = (8, 32, 6)  # B, T, C
FULL = 1318  # a draw with at least three chunks a row, of every kind, and 1e30 outside chunks
BY_TRAJECTORY = ("tis", "topr", "gspo")

seeds = st.integers(0, 2**32 - 1)
by_name = pytest.mark.parametrize("name", baselines_oracle.NAMES)


def evaluate(name, logp, batch, config, totals=None):
  """(loss, metrics, gradient), op by op: many estimators on one shape share what is compiled."""
  (loss, metrics), grad = jax.value_and_grad(ESTIMATORS[name], has_aux=True)(
    jnp.asarray(logp), jax.tree.map(jnp.asarray, batch), config, totals
  )
  return loss, metrics, grad


jitted = functools.partial(jax.jit, static_argnums=(0, 3))(evaluate)


def grad_of(name, logp, batch, config=SUM):
  return np.asarray(evaluate(name, logp, batch, config)[2])


def check_against_oracle(name, logp, batch, config, rel):
  expected = baselines_oracle.expected(name, logp, batch, config)
  assume(all(abs(ratio - bound) > 1e-5 for ratio, bound in expected.ratios))
  loss, metrics, grad = jitted(name, logp, batch, config)
  assert abs(float(loss) - expected.loss) <= rel * expected.scale
  np.testing.assert_allclose(grad, expected.grad, rtol=rel, atol=0)
  for key, value in expected.metrics.items():
    np.testing.assert_allclose(metrics[key], value, rtol=rel, atol=rel, err_msg=key)
  parts = float(metrics["loss_rl"] + metrics["loss_il"])
  assert abs(parts - expected.loss) <= rel * expected.scale


def draw(seed, dtype, on_policy=False):
  logp, batch = oracle.random_batch(seed, *SHAPE, dtype)
  return logp, dataclasses.replace(batch, old_logp=None) if on_policy else batch


@pytest.mark.slow
@by_name
@settings(max_examples=80, deadline=None)
@given(seed=seeds, case=st.sampled_from([*((c, False) for c in CONFIGS), (CONFIGS[0], True)]))
def test_agrees_with_the_oracle_in_float64(name, seed, case):
  config, on_policy = case
  with jax.enable_x64(True):
    check_against_oracle(name, *draw(seed, np.float64, on_policy), config, rel=1e-9)


@pytest.mark.slow
@by_name
@settings(max_examples=40, deadline=None)
@given(seed=seeds, config=st.sampled_from(CONFIGS[:2]))
def test_agrees_with_the_oracle_in_float32(name, seed, config):
  check_against_oracle(name, *draw(seed, np.float32), config, rel=1e-5)


@by_name
def test_the_draws_reach_what_the_estimator_cuts(name):
  """Guards the oracle tests: both sides of each truncation, clip and mask are drawn."""
  cut, masked = set(), set()
  for seed in range(30):
    expected = baselines_oracle.expected(name, *draw(seed, np.float32), CONFIGS[0])
    cut.add(0 < expected.metrics["truncated_share"] < 1)
    masked.add(0 < expected.metrics["masked_share"] < 1)
  assert (True in cut) == (name not in ("reinforce", "rloo"))
  assert (True in masked) == (name == "topr")


def whole_trajectories(parts):
  """`parts` draws of two rows as one batch, no trajectory in two of them; and its slices."""
  draws = [oracle.random_batch(seed, 2, *SHAPE[1:], np.float32) for seed in range(50, 50 + parts)]
  size = 2 * SHAPE[2]
  slices = [
    (x, dataclasses.replace(b, trajectory_ids=b.trajectory_ids + i * size))
    for i, (x, b) in enumerate(draws)
  ]
  return jax.tree.map(lambda *xs: np.concatenate(xs), *slices), slices


@by_name
def test_micro_batches_with_global_totals_sum_to_the_whole(name):
  (logp, batch), slices = whole_trajectories(4)
  totals = ipa.loss_totals(batch)
  for config in CONFIGS:
    loss, metrics, grad = evaluate(name, logp, batch, config)
    assert (np.asarray(grad) != 0).any()
    parts = [evaluate(name, x, b, config, totals) for x, b in slices]
    np.testing.assert_allclose(sum(p[0] for p in parts), loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([p[2] for p in parts]), grad, rtol=1e-5, atol=0)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *[p[1] for p in parts])
    chex.assert_trees_all_close(ipa.reduce_metrics(stacked), metrics, rtol=1e-5, atol=1e-6)


@by_name
def test_a_trajectory_cut_between_micro_batches_is_never_a_wrong_ratio(name):
  chunks = [oracle.chunk_of([-1.0], old=[o], ret=-1.0, positive=False) for o in (-0.5, -0.7)]
  logp, batch, _ = oracle.pack(chunks, [[0], [1]], 2, 1)
  totals = ipa.loss_totals(batch)
  half = jax.tree.map(lambda x: x[:1], (logp, batch))
  loss = float(evaluate(name, *half, SUM, totals)[0])
  assert math.isnan(loss) == (name in BY_TRAJECTORY)
  assert math.isfinite(float(evaluate(name, logp, batch, SUM, totals)[0]))


@by_name
@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_permuting_rows_permutes_the_gradient(name, seed):
  logp, batch = draw(seed, np.float32)
  config = CONFIGS[1]
  expected = baselines_oracle.expected(name, logp, batch, config)
  assume(all(abs(ratio - bound) > 1e-5 for ratio, bound in expected.ratios))
  order = np.random.default_rng(seed).permutation(SHAPE[0])
  loss, _, grad = jitted(name, logp, batch, config)
  moved = jax.tree.map(lambda x: x[order], (logp, batch))
  moved_loss, _, moved_grad = jitted(name, *moved, config)
  assert abs(float(loss - moved_loss)) <= 1e-6 * expected.scale
  np.testing.assert_allclose(np.asarray(grad)[order], moved_grad, rtol=1e-5, atol=0)


def test_one_batch_under_every_estimator():
  """Same arguments, same metrics, same imitation term; and each but RLOO learns differently."""
  logp, batch = draw(FULL, np.float32)
  config = CONFIGS[1]
  results = {name: evaluate(name, logp, batch, config) for name in ESTIMATORS}
  loss, metrics, _ = results["ipa"]
  for name, (other_loss, other_metrics, grad) in results.items():
    chex.assert_tree_all_finite((other_loss, other_metrics, grad))
    assert set(other_metrics) == set(metrics), name
    for key in ("loss_il", "tokens", "il_tokens", "chunks", "positive_share", "mismatch_max"):
      np.testing.assert_allclose(other_metrics[key], metrics[key], rtol=1e-5, err_msg=key)
    same = [other for other in results if np.array_equal(results[other][2], grad)]
    assert same == (["reinforce", "rloo"] if name in ("reinforce", "rloo") else [name])
  many = jnp.stack([logp, logp - 0.25])
  for name, estimator in ESTIMATORS.items():
    together = jax.vmap(lambda x, f=estimator: f(x, batch, config)[0])(many)
    alone = [evaluate(name, x, batch, config)[0] for x in many]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


@by_name
def test_only_imitation_is_left_without_reinforcement_weight(name):
  logp, batch = draw(FULL, np.float32)
  config = dataclasses.replace(CONFIGS[2], lambda_rl=0.0)
  np.testing.assert_allclose(
    grad_of(name, logp, batch, config), grad_of("ipa", logp, batch, config), rtol=1e-6
  )


@by_name
def test_penalties_are_over_the_normaliser_of_the_reinforcement_term(name):
  """KL and entropy, of reinforced tokens only, apart from lambda_rl, never without inputs."""
  logp, batch = draw(FULL, np.float32)
  batch = dataclasses.replace(batch, ref_logp=batch.behavior_logp)
  entropy = np.where(batch.chunk_ids >= 0, np.arange(SHAPE[1], dtype=np.float32), np.nan)
  for weights in ({"kl_weight": 0.3}, {"entropy_weight": 0.2}):
    config = dataclasses.replace(CONFIGS[2], **weights)
    expected = baselines_oracle.expected(name, logp, batch, config, entropy)
    run = functools.partial(ESTIMATORS[name], batch=batch, config=config, entropy_BxT=entropy)
    (loss, metrics), grad = jax.value_and_grad(run, has_aux=True)(logp)
    assert abs(float(loss) - expected.loss) <= 1e-5 * expected.scale
    np.testing.assert_allclose(grad, expected.grad, rtol=1e-4, atol=1e-7)
    assert float(metrics["loss_regulariser"]) != 0
    with pytest.raises(ValueError, match="needs"):
      evaluate(name, logp, dataclasses.replace(batch, ref_logp=None), config)


# Limits (the smallest and the largest chunks).


def test_one_token_chunks_have_the_token_mask():
  """Eq. 6's mask is the chunk mask then; a failure's weight is rho(tau) and not the token's."""
  ratios = [0.4, -0.9, -0.2]
  engines = [0.1, 0.0, 0.3]
  chunks = [
    oracle.chunk_of([-1 + r], old=[-1.0], behavior=[-1.0 - e], ret=-1.0, positive=False)
    for r, e in zip(ratios, engines, strict=True)
  ]
  logp, batch, _ = oracle.pack(chunks, [[0, 1, 2]], 3, 3, gap=0)
  np.testing.assert_allclose(grad_of("topr", logp, batch), [[0.7919] * 3], atol=5e-5)
  np.testing.assert_allclose(grad_of("ipa", logp, batch), [[1.0, 0.4066, 0.8187]], atol=5e-5)
  masked = dataclasses.replace(SUM, mask_upper=1.2)
  for name, weights in (("topr", [0.7919, 0.7919, 0]), ("ipa", [1.0, 0.4066, 0])):
    np.testing.assert_allclose(grad_of(name, logp, batch, masked), [weights], atol=5e-5)
  wins = dataclasses.replace(batch, positive=np.ones_like(batch.positive))
  for config in (SUM, masked):
    chex.assert_trees_all_equal(*(grad_of(name, logp, wins, config) for name in ("topr", "ipa")))


def test_a_token_mask_drops_a_token_where_the_chunk_mask_keeps_or_drops_all():
  odd = oracle.chunk_of([-1.0] * 20, behavior=[-3.0] + [-1.0] * 19)
  logp, batch, where = oracle.pack([odd], [[0]], 21, 1)
  for upper, chunk in ((2.0, [-1.0] * 20), (1.1, [0.0] * 20)):
    config = dataclasses.replace(SUM, mask_upper=upper)
    np.testing.assert_array_equal(grad_of("ipa", logp, batch, config)[where[0]], chunk)
    topr = grad_of("topr", logp, batch, config)[where[0]]
    np.testing.assert_array_equal(topr, [0.0] + [-1.0] * 19)
  assert evaluate("topr", logp, batch, config)[1]["masked_share"] == np.float32(1 / 20)


@pytest.mark.parametrize("normaliser", ipa.NORMALISERS)
def test_one_chunk_a_trajectory_is_equation_5(normaliser):
  rng = np.random.default_rng(0)
  chunks = []
  for i, length in enumerate((1, 2, 5, 3, 4, 2)):
    old = -rng.exponential(1.0, length)
    logp, behavior = old + rng.normal(0, 0.7, length), old + rng.normal(0, 0.7, length)
    win = i % 2 == 0
    chunks.append(oracle.Chunk(logp, old, behavior, 1.0 if win else -1.0, win, i == 4, i))
  with jax.enable_x64(True):
    logp, batch, _ = oracle.pack(chunks, [[0, 1, 2], [3, 4, 5]], 16, 3, np.float64)
    config = dataclasses.replace(SUM, normaliser=normaliser)
    results = [evaluate(name, logp, batch, config)[::2] for name in ("ipa", "topr")]
  chex.assert_trees_all_close(*results, rtol=1e-12)


def test_the_ratio_of_a_trajectory_spans_its_rows_and_chunks():
  """Two trajectories in each of two rows; an imitated chunk of the first adds nothing to it."""
  slots = ((0.4, 0), (0.1, 1), (-0.9, 0), (-0.3, 1), (9.0, 0))
  chunks = [
    oracle.chunk_of([-9.0], old=[-9.0 - r], ret=-1.0, positive=False, trajectory=i, il=r == 9.0)
    for r, i in slots
  ]
  logp, batch, where = oracle.pack(chunks, [[0, 1, 4], [2, 3]], 8, 3)
  weights = [math.exp(-0.25), math.exp(-0.1)]
  for name in ("tis", "topr"):
    grad = grad_of(name, logp, batch)
    for i in range(4):
      np.testing.assert_allclose(grad[where[i]], [weights[i % 2] / 2], rtol=1e-6)
  # GSPO: mean over two trajectories of two tokens each, below its bound (no clip with A > 0).
  gains = dataclasses.replace(batch, returns=-batch.returns)
  grad = grad_of("gspo", logp, gains)
  for i in range(4):
    np.testing.assert_allclose(grad[where[i]], [-weights[i % 2] / 4], rtol=1e-6)


def test_tis_truncates_successes_too_and_topr_does_not():
  for ratio, weight in ((-0.3, math.exp(-0.3)), (0.3, 1.0)):
    chunk = oracle.chunk_of([-1.0, -1.0], old=[-1.0 - 2 * ratio, -1.0], ret=0.5)
    logp, batch, where = oracle.pack([chunk], [[0]], 3, 1)
    np.testing.assert_allclose(grad_of("tis", logp, batch)[where[0]], [-weight / 2] * 2, rtol=1e-6)
    for name in ("topr", "reinforce", "rloo"):
      np.testing.assert_array_equal(grad_of(name, logp, batch)[where[0]], [-0.5, -0.5])


# Clips.

UP, DOWN = math.log(1.4), math.log(0.6)  # beyond every token clip, on either side


@pytest.mark.parametrize("name", ["grpo", "dapo", "gigpo", "gspo"])
@pytest.mark.parametrize(
  "ratio,advantage,slope",
  [(UP, 1.0, 0.0), (UP, -1.0, 1.4), (DOWN, 1.0, -0.6), (DOWN, -1.0, 0.0), (0.0, 2.0, -2.0)],
)
def test_ppo_clip_cuts_the_gradient_on_one_side(name, ratio, advantage, slope):
  """min(r A, clip(r) A): clipped only where a larger step would still raise the objective."""
  chunk = oracle.chunk_of([-1.0], old=[-1.0 - ratio], ret=advantage)
  logp, batch, where = oracle.pack([chunk], [[0]], 2, 1)
  loss, metrics, grad = evaluate(name, logp, batch, SUM)
  np.testing.assert_allclose(np.asarray(grad)[where[0]], [slope], rtol=1e-6)
  assert float(metrics["truncated_share"]) == (slope == 0)
  lower, upper = baselines_oracle.CLIPS[name]
  value = {0.0: -(1 + upper) if advantage > 0 else 1 - lower}.get(slope, slope)
  np.testing.assert_allclose(loss, value, rtol=1e-6)


def test_the_upper_bound_of_dapo_is_higher_and_bounds_can_be_set():
  chunk = oracle.chunk_of([-1.0], old=[-1.0 - math.log(1.25)])
  logp, batch, where = oracle.pack([chunk], [[0]], 2, 1)
  narrow, wide = (dataclasses.replace(SUM, clip_upper=upper) for upper in (0.2, 0.3))
  for name in ("grpo", "dapo", "gigpo", "gspo"):
    pulls = [grad_of(name, logp, batch, c)[where[0]][0] for c in (SUM, narrow, wide)]
    assert [pull != 0 for pull in pulls] == [name == "dapo", False, True]
  # clip_lower likewise: r = 0.75 with A < 0.
  chunk = oracle.chunk_of([-1.0], old=[-1.0 - math.log(0.75)], ret=-1.0)
  logp, batch, where = oracle.pack([chunk], [[0]], 2, 1)
  free = dataclasses.replace(SUM, clip_lower=0.3)
  for name in ("grpo", "dapo", "gigpo", "gspo"):
    assert grad_of(name, logp, batch)[where[0]] == 0
    np.testing.assert_allclose(grad_of(name, logp, batch, free)[where[0]], [0.75], rtol=1e-6)


def test_cispo_bounds_the_weight_and_keeps_the_gradient():
  ratios = (math.log(50.0), math.log(2.0), math.log(1e-3))
  chunk = oracle.chunk_of([-3.0] * 3, old=[-3.0 - r for r in ratios], ret=0.5)
  logp, batch, where = oracle.pack([chunk], [[0]], 4, 1)
  grad = grad_of("cispo", logp, batch)[where[0]]
  np.testing.assert_allclose(grad, [-0.5 * w / 3 for w in (5.0, 2.0, 1e-3)], rtol=1e-5)
  banded = dataclasses.replace(SUM, clip_lower=0.2, clip_upper=0.5)
  grad = grad_of("cispo", logp, batch, banded)[where[0]]
  np.testing.assert_allclose(grad, [-0.5 * w / 3 for w in (1.5, 1.5, 0.8)], rtol=1e-5)


@pytest.mark.parametrize("clip", [1e-3, 0.5])
def test_gspo_is_the_sequence_objective_where_a_trajectory_has_one_advantage(clip):
  """Against J = mean_i min(s_i A_i, clip(s_i) A_i), differentiated numerically through s_i."""
  rng = np.random.default_rng(1)
  trajectory = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3])  # of each chunk, three a row
  advantages = (1.0, -0.5, -2.0, 0.7)
  chunks = []
  for i in trajectory:
    old = -rng.exponential(1.0, rng.integers(1, 4))
    logp = old + rng.normal((-0.3, -0.3, 0.3, 0.3)[i], 0.05, len(old))  # cut, or far from it
    chunks.append(oracle.chunk_of(logp, old=old, ret=advantages[i], trajectory=int(i)))
  config = dataclasses.replace(SUM, clip_lower=clip, clip_upper=clip)

  def objective(x):
    total = 0.0
    for i, advantage in enumerate(advantages):
      of = [j for j in range(len(chunks)) if trajectory[j] == i]
      logs = [x[where[j]] - chunks[j].old for j in of]
      s = np.exp(np.concatenate(logs).mean())
      total += min(s * advantage, np.clip(s, 1 - clip, 1 + clip) * advantage) / len(advantages)
    return total

  with jax.enable_x64(True):
    logp, batch, where = oracle.pack(chunks, [[0, 1, 2], [3, 4, 5], [6, 7, 8]], 16, 3, np.float64)
    loss, _, grad = evaluate("gspo", logp, batch, config)
  np.testing.assert_allclose(loss, -objective(logp), rtol=1e-12)
  for row, column in np.argwhere(batch.chunk_ids >= 0):
    step = np.zeros_like(logp)
    step[row, column] = 1e-6
    slope = (objective(logp + step) - objective(logp - step)) / 2e-6
    np.testing.assert_allclose(grad[row, column], -slope, rtol=1e-6, atol=1e-9)


@by_name
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_policy_ratios_are_exactly_one_and_pull_with_the_advantage(name, dtype):
  """All estimators are REINFORCE there, up to Z; here all chunks and trajectories are alike."""
  rng = np.random.default_rng(0)
  chunks = [oracle.chunk_of(-rng.exponential(3.0, 4), ret=-0.5, trajectory=i) for i in range(4)]
  chunks = [dataclasses.replace(c, positive=False) for c in chunks]
  logp, batch, where = oracle.pack(chunks, [[0, 1], [2, 3]], 12, 2)
  logp = jnp.asarray(logp, dtype)
  config = dataclasses.replace(SUM, normaliser="token_mean")
  for old in (None, logp, logp.astype(jnp.float32)):
    on_policy = dataclasses.replace(batch, old_logp=old, behavior_logp=logp)
    loss, metrics, grad = evaluate(name, logp, on_policy, config)
    assert float(metrics["ratio_mean"]) == 1.0
    assert float(metrics["truncated_share"]) == float(metrics["masked_share"]) == 0.0
    assert loss.dtype == jnp.float32
    for i in range(4):
      np.testing.assert_array_equal(grad[where[i]].astype(jnp.float32), [0.5 / 16] * 4)


# Safety.


@by_name
def test_gradient_flows_through_the_log_probs_only(name):
  logp, batch = draw(FULL, np.float32)
  fields = (batch.old_logp, batch.behavior_logp, batch.returns)

  @jax.jit
  def loss(fields):
    old, behavior, returns = fields
    moved = dataclasses.replace(batch, old_logp=old, behavior_logp=behavior, returns=returns)
    return ESTIMATORS[name](logp, moved, CONFIGS[0])[0]

  for grad in jax.grad(loss)(fields):
    np.testing.assert_array_equal(grad, 0)


@by_name
@pytest.mark.parametrize("garbage", [1e38, np.nan, np.inf, -np.inf])
def test_what_lies_outside_chunks_is_never_read(name, garbage):
  """Nor what an imitated chunk's sampler said: it had none."""
  results = []
  for filler in (0.5, garbage):
    expert = oracle.chunk_of([-1.0], old=[filler], behavior=[filler], il=True, trajectory=2)
    chunks = [
      oracle.chunk_of([-1.0, -2.0], old=[-1.1, -1.5], ret=0.5),
      oracle.chunk_of([-3.0], old=[-2.9], ret=-1.0, positive=False, trajectory=1),
      expert,
    ]
    logp, batch, _ = oracle.pack(chunks, [[0], [1], [2], []], 5, 3, garbage=filler)
    unused = ~np.isin(np.arange(12).reshape(4, 3), (0, 3, 6))
    batch.trajectory_ids[unused] = 0 if filler == 0.5 else -7
    results.append([evaluate(name, logp, batch, config) for config in CONFIGS])
  chex.assert_tree_all_finite(results[1])
  chex.assert_trees_all_equal(*results)


@by_name
def test_an_empty_batch_costs_nothing(name):
  logp, batch, _ = oracle.pack([], [[], [], []], 5, 3, garbage=np.nan)
  loss, metrics, grad = evaluate(name, logp, batch, CONFIGS[0])
  assert float(loss) == 0
  assert all(float(value) == 0 for value in metrics.values())
  np.testing.assert_array_equal(grad, 0)


@by_name
def test_a_ratio_beyond_floats_is_harmless_where_it_is_cut_or_has_no_advantage(name):
  chunks = [
    oracle.chunk_of([-1.0], old=[-201.0], ret=1.0, trajectory=0),  # e^200
    oracle.chunk_of([-1.0], old=[-201.0], ret=0.0, trajectory=1),
    oracle.chunk_of([-201.0], old=[-1.0], ret=-1.0, positive=False, trajectory=2),  # e^-200
  ]
  logp, batch, _ = oracle.pack(chunks, [[0, 1, 2]], 6, 3)
  loss, _, grad = evaluate(name, logp, batch, CONFIGS[1])
  chex.assert_tree_all_finite((loss, grad))


@by_name
def test_shapes_are_checked(name):
  logp, batch = draw(FULL, np.float32)
  for wrong in (
    (logp[:, :-1], batch),
    (logp, dataclasses.replace(batch, returns=batch.il_mask[0])),
  ):
    with pytest.raises(AssertionError):
      ESTIMATORS[name](*wrong, CONFIGS[0])


@pytest.mark.parametrize(
  "name,setting,why",
  [
    ("ppo", {}, "unknown estimator 'ppo'"),
    ("ipa", {"clip_upper": 0.2}, "clip_upper is not read by the estimator 'ipa'"),
    ("reinforce", {"mask_upper": 2.0}, "mask_upper is not read by the estimator 'reinforce'"),
    ("grpo", {"mask_lower": 0.5}, "mask_lower is not read by the estimator 'grpo'"),
    ("rloo", {"centre": "group"}, "rloo needs IPAConfig.centre='leave_one_out', got 'group'"),
  ],
)
def test_settings_that_an_estimator_would_ignore_are_refused(name, setting, why):
  with pytest.raises(ValueError, match=why):
    check_estimator(name, ipa.IPAConfig(**setting))


def test_the_settings_that_are_refused_are_those_not_read():
  """Each of the four changes the gradient of exactly the estimators that accept it."""
  logp, batch = draw(FULL, np.float32)
  behavior = batch.behavior_logp + np.linspace(-2, 2, SHAPE[1], dtype=np.float32)
  batch = dataclasses.replace(batch, behavior_logp=behavior)
  start = ipa.IPAConfig(centre="leave_one_out")
  changes = {"mask_upper": 1.1, "mask_lower": 0.9, "clip_lower": 0.7, "clip_upper": 1.0}
  for name in ESTIMATORS:
    check_estimator(name, start)
    before = grad_of(name, logp, batch, start)
    for setting, value in changes.items():
      config = dataclasses.replace(start, **{setting: value})
      try:
        check_estimator(name, config)
      except ValueError:
        read = False
      else:
        read = True
      assert read != np.array_equal(before, grad_of(name, logp, batch, config)), (name, setting)
