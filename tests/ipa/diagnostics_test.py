"""Putting the metrics of micro-batches together."""

import jax.numpy as jnp

from rome import ipa


def test_maxima_are_maxed_and_shares_summed():
  stacked = {"masked_share": jnp.array([0.25, 0.5]), "mismatch_max": jnp.array([0.25, 0.5])}
  reduced = ipa.reduce_metrics(stacked)
  assert {name: float(value) for name, value in reduced.items()} == {
    "masked_share": 0.75,
    "mismatch_max": 0.5,
  }
