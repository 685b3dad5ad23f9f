"""Metrics of micro-batches put together, effective sample size, profiles, histograms, signs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome import ipa
from tests.ipa import oracle

SHAPE = (8, 32, 6)
CONFIG = ipa.IPAConfig(mask_upper=1.1, normaliser="trajectory_sum")


def test_maxima_are_maxed_and_shares_summed():
  stacked = {"masked_share": jnp.array([0.25, 0.5]), "mismatch_max": jnp.array([0.25, 0.5])}
  reduced = ipa.reduce_metrics(stacked)
  assert {name: float(value) for name, value in reduced.items()} == {
    "masked_share": 0.75,
    "mismatch_max": 0.5,
  }


def test_the_mismatch_by_position_is_counted_in_parts_of_the_row():
  chunks = [oracle.chunk_of([-1.0, -2.0]), oracle.chunk_of([-1.0], il=True)]
  logp, batch, _ = oracle.pack(chunks, [[0, 1]], 8, 4)
  places = np.zeros((1, 8), np.int32)
  first, second = np.flatnonzero(np.asarray(batch.chunk_ids)[0] == 0)
  places[0, first], places[0, second] = 1, 6  # of 8: the first part of four, and the last
  gap = np.zeros((1, 8), np.float32)
  gap[0, first], gap[0, second] = 0.5, -0.25
  batch = dataclasses.replace(
    batch, old_logp=None, behavior_logp=np.asarray(logp) - gap, positions=places
  )
  sums = ipa.mismatch_by_position(logp, batch, 4)
  halves = jax.tree.map(lambda x: jnp.stack([x, x]), sums)
  got = ipa.mismatch_profile(ipa.reduce_metrics(halves | {"loss": jnp.ones(2)}))
  assert got.keys() == {"loss", "mismatch_part_0", "mismatch_part_3"}  # no tokens, no mean
  np.testing.assert_allclose([got["mismatch_part_0"], got["mismatch_part_3"]], [0.5, 0.25])
  assert float(sums["mismatch_tokens_0"]) == 1 and float(sums["mismatch_tokens_1"]) == 0


def three_chunks(**slot):
  """Chunks of one trajectory with ratios 2, 0.5 and 0.25; the second is beyond the mask."""
  return [
    oracle.chunk_of([-1.0], [-1.0 - np.log(2)], **slot),
    oracle.chunk_of([-1.0, -1.0], [-1 + np.log(2)] * 2, [-3.0, -3.0], **slot),
    oracle.chunk_of([-1.0], [-1 + np.log(4)], **slot),
  ]


@pytest.mark.slow
def test_effective_sample_share_is_kishs():
  logp, batch, _ = oracle.pack(three_chunks(positive=False), [[0, 1, 2]], 9, 4)
  _, metrics = ipa.ipa_loss(logp, batch, CONFIG)
  weights = np.array([1.0, 0.0, 0.25])  # truncated, masked, as it is
  expected = weights.sum() ** 2 / (3 * (weights**2).sum())
  np.testing.assert_allclose(ipa.effective_sample_share(metrics), expected, rtol=1e-6)
  on_policy = dataclasses.replace(batch, old_logp=None, behavior_logp=logp)
  assert ipa.effective_sample_share(ipa.ipa_loss(logp, on_policy, CONFIG)[1]) == 1
  nothing = dataclasses.replace(on_policy, behavior_logp=logp - 9)
  assert ipa.effective_sample_share(ipa.ipa_loss(logp, nothing, CONFIG)[1]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[[0, 1, 2], [3, 4]], [[0, 1], [2, 3, 4]], [[0], [1, 3, 2, 4]]])
def test_a_profile_counts_by_place_in_the_episode(layout):
  """Wherever the episode's chunks lie; an imitated chunk and another episode do not shift them."""
  chunks = [
    *three_chunks(positive=False, trajectory=5),
    oracle.chunk_of([-1.0], il=True, trajectory=5),
    oracle.chunk_of([-1.0], [-2.0], trajectory=1, positive=True),
  ]
  logp, batch, _ = oracle.pack(chunks, layout, 12, 4, garbage=np.nan)
  profile = jax.jit(ipa.episode_profile, static_argnums=(2, 3))(logp, batch, CONFIG, 4)
  np.testing.assert_array_equal(profile["chunks"], [2, 1, 1, 0])
  np.testing.assert_array_equal(profile["masked"], [0, 1, 0, 0])
  np.testing.assert_array_equal(profile["truncated"], [1, 0, 0, 0])
  short = ipa.episode_profile(logp, batch, CONFIG, 2)
  np.testing.assert_array_equal(short["chunks"], [2, 2])  # the last place takes the rest


def test_a_histogram_has_a_bin_below_and_one_above():
  logp, batch, _ = oracle.pack(three_chunks(), [[0, 1], [2]], 9, 4, garbage=np.nan)
  counts = ipa.ratio_histogram(logp, batch, CONFIG, jnp.array([0.3, 0.9, 1.5]))
  np.testing.assert_array_equal(counts, [1, 1, 0, 1])


@functools.partial(jax.jit, static_argnums=2)
def gradient(logp, batch, config, totals):
  return jax.grad(ipa.ipa_loss, has_aux=True)(logp, batch, config, totals)[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_gradients_of_the_signs_add_up(seed):
  logp, batch = oracle.random_batch(seed, *SHAPE, np.float32)
  config = dataclasses.replace(CONFIG, lambda_il=0.0)
  totals = ipa.loss_totals(batch)
  positive, negative = ipa.split_by_sign(batch)
  parts = [np.asarray(gradient(logp, b, config, totals)) for b in (positive, negative)]
  np.testing.assert_array_equal(parts[0] + parts[1], gradient(logp, batch, config, totals))
  assert not (parts[0] * parts[1]).any()
  of_positive = np.take_along_axis(batch.positive, np.maximum(batch.chunk_ids, 0), axis=1)
  assert not parts[0][~of_positive].any() and not parts[1][of_positive].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
@pytest.mark.slow
def test_profiles_and_histograms_count_every_reinforced_chunk(seed):
  logp, batch = oracle.random_batch(seed, *SHAPE, np.float32)
  _, metrics = ipa.ipa_loss(logp, batch, CONFIG)
  profile = ipa.episode_profile(logp, batch, CONFIG, 16)
  histogram = ipa.ratio_histogram(logp, batch, CONFIG, jnp.array([0.5, 1.0, 2.0]))
  assert profile["chunks"].sum() == histogram.sum() == metrics["chunks"]
  chunks = max(float(metrics["chunks"]), 1.0)
  np.testing.assert_allclose(profile["masked"].sum() / chunks, metrics["masked_share"], rtol=1e-6)
  np.testing.assert_allclose(
    profile["truncated"].sum() / chunks, metrics["truncated_share"], rtol=1e-6
  )
