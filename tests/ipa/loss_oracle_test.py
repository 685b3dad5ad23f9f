"""`ipa_loss` against the numpy oracle and under the changes of layout that must not matter."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rome import ipa
from tests.ipa import oracle

CONFIGS = (
  ipa.IPAConfig(),
  ipa.IPAConfig(normaliser="trajectory_sum", mask_upper=1.1, lambda_il=0.7),
  ipa.IPAConfig(normaliser="chunk_mean", mask_lower=0.6, mask_upper=2.0, il_weight="policy"),
  ipa.IPAConfig(normaliser="trajectory_mean", mask_upper=float("inf"), lambda_rl=0.5),
)
SHAPE = (8, 32, 6)  # B, T, C
FULL = 1318  # a draw with at least three chunks a row, of every kind, and 1e30 outside chunks

seeds = st.integers(0, 2**32 - 1)
configs = st.sampled_from(CONFIGS)
by_normaliser = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.normaliser)


@functools.partial(jax.jit, static_argnums=2)
def loss_and_grad(logp, batch, config, totals=None):
  (loss, metrics), grad = jax.value_and_grad(ipa.ipa_loss, has_aux=True)(
    logp, batch, config, totals
  )
  return loss, metrics, grad


def draw(seed, dtype, on_policy=False):
  logp, batch = oracle.random_batch(seed, *SHAPE, dtype)
  if on_policy:
    batch = dataclasses.replace(batch, old_logp=None)
  return logp, batch


def check_against_oracle(logp, batch, config, rel):
  expected = oracle.ipa(logp, batch, config)
  bounds = (config.mask_lower, config.mask_upper)
  assume(all(abs(r - bound) > 1e-5 for r in expected.ratios for bound in bounds))
  loss, metrics, grad = loss_and_grad(logp, batch, config)
  assert abs(float(loss) - expected.loss) <= rel * expected.scale
  np.testing.assert_allclose(grad, expected.grad, rtol=rel, atol=0)
  for name, value in expected.metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=rel, atol=rel, err_msg=name)
  parts = float(metrics["loss_rl"] + metrics["loss_il"] + metrics["loss_regulariser"])
  assert abs(parts - expected.loss) <= rel * expected.scale


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(seeds, configs, st.booleans())
def test_agrees_with_the_oracle_in_float64(seed, config, on_policy):
  with jax.enable_x64(True):
    check_against_oracle(*draw(seed, np.float64, on_policy), config, rel=1e-9)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(seeds, configs, st.booleans())
def test_agrees_with_the_oracle_in_float32(seed, config, on_policy):
  check_against_oracle(*draw(seed, np.float32, on_policy), config, rel=1e-5)


def test_the_draws_cover_what_they_claim():
  """Guards the oracle tests: the generator must reach the corners that they are there for."""
  seen = set()
  for seed in range(200):
    logp, batch = draw(seed, np.float32)
    ids = batch.chunk_ids
    expected = oracle.ipa(logp, batch, CONFIGS[1])
    lengths = [(row == c).sum() for row in ids for c in range(row.max() + 1)]
    adjacent = (ids[:, :-1] >= 0) & (ids[:, 1:] >= 0) & (ids[:, :-1] != ids[:, 1:])
    rows_of = {}
    for row, c in zip(*np.nonzero(ids.max(1, keepdims=True) >= np.arange(SHAPE[2])), strict=True):
      rows_of.setdefault(int(batch.trajectory_ids[row, c]), set()).add(int(row))
    corners = {
      "no chunk at all": not lengths,
      "empty row": bool((ids < 0).all(1).any()),
      "one-token chunk": 1 in lengths,
      "adjacent chunks": bool(adjacent.any()),
      "all masked": expected.metrics["masked_share"] == 1,
      "some masked": 0 < expected.metrics["masked_share"] < 1,
      "some truncated": 0 < expected.metrics["truncated_share"] < 1,
      "imitated": expected.metrics["il_tokens"] > 0,
      "split trajectory": any(len(rows) > 1 for rows in rows_of.values()),
      "full row": bool((ids.max(1) == SHAPE[2] - 1).any()),
      "garbage": bool(np.isnan(logp).any()),
    }
    seen |= {name for name, holds in corners.items() if holds}
  assert seen == set(corners)


def split(batch, parts):
  """Cuts arrays with a leading row axis into `parts` slices."""
  cut = lambda x: x.reshape(parts, -1, *x.shape[1:])  # noqa: E731
  stacked = jax.tree.map(cut, batch)
  return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(parts)]


@pytest.mark.slow
@by_normaliser
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_micro_batches_with_global_totals_sum_to_the_whole(config, parts):
  """Also where a trajectory is cut between micro-batches, which these draws do."""
  logp, batch = draw(FULL, np.float32)
  loss, metrics, grad = loss_and_grad(logp, batch, config)
  slices = split((logp, batch), parts)
  bound = batch.returns.size
  totals = [jax.jit(ipa.loss_totals, static_argnums=1)(b, bound) for _, b in slices]
  totals = jax.tree.map(lambda *xs: sum(xs), *totals)
  chex.assert_trees_all_equal(totals, ipa.loss_totals(batch))

  results = [loss_and_grad(x, b, config, totals) for x, b in slices]
  np.testing.assert_allclose(sum(r[0] for r in results), loss, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(np.concatenate([r[2] for r in results]), grad, rtol=1e-6, atol=0)
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *[r[1] for r in results])
  chex.assert_trees_all_close(ipa.reduce_metrics(stacked), metrics, rtol=1e-5, atol=1e-6)


@by_normaliser
def test_own_totals_of_slices_do_not_sum_to_the_whole(config):
  """So the test above could fail: without global totals a slice weighs itself."""
  logp, batch = draw(FULL, np.float32)
  grad = loss_and_grad(logp, batch, config)[2]
  count = jax.jit(ipa.loss_totals, static_argnums=1)
  bound = batch.returns.size
  parts = [loss_and_grad(x, b, config, count(b, bound))[2] for x, b in split((logp, batch), 4)]
  assert not np.allclose(np.concatenate(parts), grad, rtol=1e-2, atol=0)


@by_normaliser
def test_a_row_does_not_see_its_neighbours(config):
  """Given the counts, another row's log-probs change neither this row's gradient nor its loss."""
  logp, batch = draw(FULL, np.float32)
  batch = dataclasses.replace(batch, positive=np.zeros_like(batch.positive))
  other_logp, other = logp.copy(), batch.behavior_logp.copy()
  other_logp[3], other[3] = other_logp[3] - 0.5, other[3] - 0.3
  grad = np.asarray(loss_and_grad(logp, batch, config)[2])
  changed = dataclasses.replace(batch, behavior_logp=other)
  other_grad = np.asarray(loss_and_grad(other_logp, changed, config)[2])
  keep = np.arange(SHAPE[0]) != 3
  np.testing.assert_array_equal(grad[keep], other_grad[keep])
  assert (grad[3] != other_grad[3]).any()


@by_normaliser
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_permuting_rows_permutes_the_gradient(config, seed):
  logp, batch = draw(seed, np.float32)
  order = np.random.default_rng(seed).permutation(SHAPE[0])
  loss, _, grad = loss_and_grad(logp, batch, config)
  moved_loss, _, moved_grad = loss_and_grad(
    *jax.tree.map(lambda x: x[order], (logp, batch)), config
  )
  scale = oracle.ipa(logp, batch, config).scale
  assert abs(float(loss - moved_loss)) <= 1e-6 * scale
  np.testing.assert_array_equal(np.asarray(grad)[order], moved_grad)


@pytest.mark.slow
@by_normaliser
def test_splitting_and_packing_trajectories_changes_nothing(config):
  """Three trajectories one a row, split over rows, packed into one row: one loss, one gradient."""
  rng = np.random.default_rng(0)
  chunks = []
  for i, length in enumerate([2, 3, 1, 4, 2, 2]):
    logp = -rng.exponential(1.0, length)
    old = logp + rng.normal(0, 0.5, length)
    behavior = old - rng.normal(0, 0.3)
    slot = (rng.normal(), i < 3, i == 5, [0, 0, 0, 1, 1, 2][i])
    chunks.append(oracle.Chunk(logp, old, behavior, *slot))
  layouts = (
    [[0, 1, 2], [3, 4], [5], [], []],
    [[0], [1, 2], [3], [4], [5]],
    [[], [], [5, 3, 4, 0, 1, 2], [], []],
    [[1, 5, 3], [], [2, 0, 4], [], []],
  )
  results = []
  for layout in layouts:
    with jax.enable_x64(True):
      logp, batch, where = oracle.pack(chunks, layout, 24, 6, np.float64, gap=1, garbage=7.0)
      loss, _, grad = loss_and_grad(logp, batch, config)
    grad = np.asarray(grad)
    assert np.count_nonzero(grad) <= 14  # nothing outside the 14 tokens of these chunks
    by_chunk = np.concatenate([grad[where[i]] for i in range(len(chunks))])
    results.append((float(loss), by_chunk))
  for loss, by_chunk in results[1:]:
    np.testing.assert_allclose(loss, results[0][0], rtol=1e-12)
    np.testing.assert_allclose(by_chunk, results[0][1], rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("normaliser", ipa.NORMALISERS)
@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_without_imitation_weight_only_equation_9_is_left(normaliser, seed):
  """lambda_IL = 0: imitated chunks might as well be outside every chunk."""
  logp, batch = draw(seed, np.float32)
  config = ipa.IPAConfig(lambda_il=0.0, normaliser=normaliser)
  gone = batch.chunk_ids.copy()
  for row, slot in zip(*np.nonzero(batch.il_mask), strict=True):
    gone[row][gone[row] == slot] = -1
  without = dataclasses.replace(batch, chunk_ids=gone)
  chex.assert_trees_all_equal(
    loss_and_grad(logp, batch, config)[::2], loss_and_grad(logp, without, config)[::2]
  )
