"""Scalars that say how a batch looked to the loss, made so that those of micro-batches add up."""

import chex
import jax
import jax.numpy as jnp

from rome.ipa.totals import TermTotals


def policy_metrics(
  mismatch_BxT: chex.Array,
  log_ratio_BxC: chex.Array,
  kept_BxC: chex.Array,
  positive_BxC: chex.Array,
  rl_BxC: chex.Array,
  totals: TermTotals,
) -> dict[str, chex.Array]:
  """Diagnostics of the reinforcement term, as shares of the global totals.

  Args:
    mismatch_BxT: |old log-prob - engine's log-prob|, 0 outside reinforced chunks.
    log_ratio_BxC: mean log pi_theta/pi_old.
    kept_BxC: bool, m_c.
    positive_BxC: bool.
    rl_BxC: bool, the chunks that exist and are reinforced.
    totals: global counts of the reinforcement term.

  Returns:
    masked_share: chunks out by the mismatch mask, of all reinforced chunks. truncated_share: chunks
    of non-positive trajectories whose ratio exceeds 1, of all. positive_share: chunks of positive
    trajectories, of all. ratio_mean: mean of rho_c. mismatch_mean, mismatch_max: over tokens, in
    nats.
  """
  chunks = jnp.maximum(totals.chunks, 1)

  def mean(values_BxC: chex.Array) -> chex.Array:
    return jnp.where(rl_BxC, values_BxC, 0.0).sum() / chunks

  return {
    "masked_share": mean(~kept_BxC),
    "truncated_share": mean(~positive_BxC & (log_ratio_BxC > 0)),
    "positive_share": mean(positive_BxC),
    "ratio_mean": mean(jnp.exp(log_ratio_BxC)),
    "mismatch_mean": mismatch_BxT.sum() / jnp.maximum(totals.tokens, 1),
    "mismatch_max": mismatch_BxT.max(initial=0.0),
  }


def reduce_metrics(stacked: dict[str, chex.Array]) -> dict[str, chex.Array]:
  """Puts micro-batches' metrics together: names ending in `_max` by maximum, the others by sum.

  Every other metric of `ipa_loss` is a sum, or a share of the global totals, so its parts add up to
  the value of the whole batch.

  Args:
    stacked: metrics with a leading axis of micro-batches, as `jax.lax.scan` stacks them.
  """
  chex.assert_rank(list(stacked.values()), 1)

  def reduce(name: str, values: jax.Array) -> jax.Array:
    return values.max() if name.endswith("_max") else values.sum()

  return {name: reduce(name, values) for name, values in stacked.items()}
