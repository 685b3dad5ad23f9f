"""Counts and the normalisers made of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome import ipa
from rome.ipa import totals as totals_lib
from tests.ipa import oracle


def small_batch():
  """Trajectory 0: chunks of 2 and 1 tokens in two rows; 1: one of 3; 2: imitated, one of 4."""
  chunks = [
    oracle.chunk_of([-1.0] * 2, trajectory=0),
    oracle.chunk_of([-1.0] * 3, trajectory=1),
    oracle.chunk_of([-1.0], trajectory=0),
    oracle.chunk_of([-1.0] * 4, trajectory=2, il=True),
  ]
  return oracle.pack(chunks, [[0, 1], [2], [3], []], 8, 2)[1]


def test_counts():
  totals = jax.jit(ipa.loss_totals)(small_batch())
  assert (float(totals.rl.tokens), float(totals.rl.chunks)) == (6.0, 3.0)
  assert (float(totals.il.tokens), float(totals.il.chunks)) == (4.0, 1.0)
  np.testing.assert_array_equal(totals.rl.trajectory_tokens, [3, 3] + [0] * 6)
  np.testing.assert_array_equal(totals.il.trajectory_tokens, [0, 0, 4] + [0] * 5)
  assert float(totals.rl.trajectories) == 2 and float(totals.il.trajectories) == 1


@pytest.mark.slow
def test_totals_of_slices_add_up_though_a_trajectory_is_cut():
  batch = small_batch()
  parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(4)]
  totals = [ipa.loss_totals(part, num_trajectories=8) for part in parts]
  chex.assert_trees_all_equal(jax.tree.map(lambda *xs: sum(xs), *totals), ipa.loss_totals(batch))


@pytest.mark.parametrize(
  ("normaliser", "expected"),
  [
    ("token_mean", [1 / 6, 1 / 6, 1 / 6]),
    ("trajectory_sum", [1 / 2, 1 / 2, 1 / 2]),
    ("chunk_mean", [1 / (3 * 2), 1 / (3 * 3), 1 / (3 * 1)]),
    ("trajectory_mean", [1 / (2 * 3), 1 / (2 * 3), 1 / (2 * 3)]),
  ],
)
@pytest.mark.slow
def test_inverse_normalisers(normaliser, expected):
  batch = small_batch()
  lengths = ipa.chunk_lengths(batch.chunk_ids, 2)
  got = totals_lib.inverse_normaliser(
    normaliser, lengths, batch.trajectory_ids, ipa.loss_totals(batch).rl
  )
  np.testing.assert_allclose([got[0, 0], got[0, 1], got[1, 0]], expected, rtol=1e-6)
  assert bool(jnp.isfinite(got).all())


def test_a_trajectory_id_out_of_range_does_not_pass_for_a_weight():
  batch = small_batch()
  totals = ipa.loss_totals(batch, num_trajectories=1)
  got = totals_lib.inverse_normaliser(
    "trajectory_mean", ipa.chunk_lengths(batch.chunk_ids, 2), batch.trajectory_ids, totals.rl
  )
  assert bool(jnp.isnan(got[0, 1])) and bool(jnp.isfinite(got[0, 0]))
