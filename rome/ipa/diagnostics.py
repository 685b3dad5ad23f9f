"""How a batch looked to the loss: scalars that add up over micro-batches, profiles, histograms.

Left out: drawing them, which the trainer's report does.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from rome.ipa.batch import ChunkBatch
from rome.ipa.chunks import chunk_lengths, spread_to_tokens
from rome.ipa.config import IPAConfig
from rome.ipa.ratios import ChunkRatios, chunk_ratios
from rome.ipa.totals import TermTotals


def policy_metrics(
  mismatch_BxT: chex.Array,
  ratios: ChunkRatios,
  positive_BxC: chex.Array,
  rl_BxC: chex.Array,
  totals: TermTotals,
) -> dict[str, chex.Array]:
  """Diagnostics of the reinforcement term, as shares of the global totals.

  Args:
    mismatch_BxT: |old log-prob - engine's log-prob|, 0 outside reinforced chunks.
    ratios: of every chunk.
    positive_BxC: bool.
    rl_BxC: bool, the chunks that exist and are reinforced.
    totals: global counts of the reinforcement term.

  Returns:
    masked_share: chunks out by the mismatch mask, of all reinforced chunks. truncated_share: chunks
    of non-positive trajectories whose ratio exceeds 1, of all. positive_share: chunks of positive
    trajectories, of all. ratio_mean: mean of rho_c. weight_mean, weight_square_mean: of m_c w_c,
    see `effective_sample_share`. mismatch_mean, mismatch_max: over tokens, in nats.
  """
  chunks = jnp.maximum(totals.chunks, 1)

  def mean(values_BxC: chex.Array) -> chex.Array:
    return jnp.where(rl_BxC, values_BxC, 0.0).sum() / chunks

  return {
    "masked_share": mean(~ratios.kept_BxC),
    "truncated_share": mean(~positive_BxC & (ratios.log_ratio_BxC > 0)),
    "positive_share": mean(positive_BxC),
    "ratio_mean": mean(jnp.exp(ratios.log_ratio_BxC)),
    "weight_mean": mean(ratios.weight_BxC),
    "weight_square_mean": mean(ratios.weight_BxC**2),
    "mismatch_mean": mismatch_BxT.sum() / jnp.maximum(totals.tokens, 1),
    "mismatch_max": mismatch_BxT.max(initial=0.0),
  }


def mismatch_by_position(
  logp_BxT: chex.Array, batch: ChunkBatch, num_parts: int
) -> dict[str, chex.Array]:
  """Where in their contexts the engine's log-probs and the trainer's differ, as sums that add.

  Args:
    logp_BxT: log-probs under pi_theta, which are pi_old's where the batch is on-policy.
    batch: reads chunk_ids, old_logp, behavior_logp, il_mask and positions, the token's place in its
      context.
    num_parts: static P; part p has places p T / P up to (p + 1) T / P.

  Returns:
    mismatch_sum_p and mismatch_tokens_p for p = 0..P-1: the sum of |old log-prob - engine's
    log-prob| in nats over the reinforced tokens of the part, and their number. `reduce_metrics`
    adds them, `mismatch_profile` divides.
  """
  chex.assert_equal_shape([logp_BxT, batch.chunk_ids, batch.positions])
  old_BxT = logp_BxT if batch.old_logp is None else batch.old_logp
  rl_BxT = spread_to_tokens(_reinforced(batch), batch.chunk_ids)
  gap_BxT = jnp.where(rl_BxT, jnp.abs(old_BxT - batch.behavior_logp), 0)
  part_BxT = batch.positions * num_parts // logp_BxT.shape[1]
  metrics = {}
  for p in range(num_parts):
    here_BxT = rl_BxT & (part_BxT == p)
    metrics[f"mismatch_sum_{p}"] = jnp.where(here_BxT, gap_BxT, 0).sum()
    metrics[f"mismatch_tokens_{p}"] = here_BxT.sum().astype(jnp.float32)
  return jax.lax.stop_gradient(metrics)


def mismatch_profile(metrics: dict[str, float]) -> dict[str, float]:
  """The metrics with the sums of `mismatch_by_position` turned into means.

  Args:
    metrics: of the whole batch, so after `reduce_metrics`.

  Returns:
    All others as they are, and mismatch_part_p in nats a token, for the parts that have tokens.
  """
  sums = {k: v for k, v in metrics.items() if k.startswith("mismatch_sum_")}
  counts = {k.replace("_sum_", "_tokens_"): k for k in sums}
  others = {k: v for k, v in metrics.items() if k not in sums and k not in counts}
  means = {
    key.replace("_sum_", "_part_"): sums[key] / metrics[count]
    for count, key in counts.items()
    if metrics[count] > 0
  }
  return others | means


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


def effective_sample_share(metrics: dict[str, chex.Array]) -> chex.Array:
  """Kish's effective sample size of the chunk weights m_c w_c, as a share of the chunks.

  (sum w)^2 / (n sum w^2): 1 where all weigh alike, 1/n where one chunk has all the weight, 0 where
  none has any.

  Args:
    metrics: of the whole batch, so after `reduce_metrics`; reads weight_mean, weight_square_mean.
  """
  square = metrics["weight_square_mean"]
  return jnp.where(square > 0, metrics["weight_mean"] ** 2 / jnp.where(square > 0, square, 1), 0)


def episode_profile(
  logp_BxT: chex.Array, batch: ChunkBatch, config: IPAConfig, num_positions: int
) -> dict[str, chex.Array]:
  """Where in the episode the loss masks and truncates: counts by place of the chunk.

  Args:
    logp_BxT: log-probs under pi_theta.
    batch: a trajectory's reinforced chunks lie in episode order, over slots and then rows, so their
      rank is their place; of a chunk behind a prefilled prefix it is the place behind the prefix.
      `rome.rollout.pack` does so where every trajectory has one row.
    config: reads mask_lower and mask_upper.
    num_positions: static P; chunks beyond it count at the last place.

  Returns:
    {"chunks", "masked", "truncated"}: int [P], of all chunks, of those out by the mismatch mask and
    of those whose ratio was cut to 1. Counts of batches add.
  """
  ratios = chunk_ratios(logp_BxT, batch, config)
  rl_BxC = _reinforced(batch)
  place = jnp.minimum(_rank_in_trajectory(batch.trajectory_ids, rl_BxC), num_positions - 1)

  def count(where_BxC: chex.Array) -> chex.Array:
    values = (where_BxC & rl_BxC).astype(jnp.int32).reshape(-1)
    return jax.ops.segment_sum(values, place, num_segments=num_positions)

  truncated_BxC = ~batch.positive.astype(bool) & (ratios.log_ratio_BxC > 0)
  return {
    "chunks": count(rl_BxC),
    "masked": count(~ratios.kept_BxC),
    "truncated": count(truncated_BxC),
  }


def ratio_histogram(
  logp_BxT: chex.Array, batch: ChunkBatch, config: IPAConfig, edges_E: chex.Array
) -> chex.Array:
  """Histogram of rho_c over reinforced chunks: int [E + 1].

  Args:
    logp_BxT: log-probs under pi_theta.
    batch: reads chunk_ids, old_logp, il_mask.
    config: as for `ipa_loss`.
    edges_E: ascending; bin i holds edges[i-1] <= rho < edges[i], the outer bins what is beyond.
  """
  chex.assert_rank(edges_E, 1)
  ratio_BxC = jnp.exp(chunk_ratios(logp_BxT, batch, config).log_ratio_BxC)
  bins = jnp.searchsorted(jnp.asarray(edges_E), ratio_BxC.reshape(-1), side="right")
  counted = _reinforced(batch).astype(jnp.int32).reshape(-1)
  return jax.ops.segment_sum(counted, bins, num_segments=len(edges_E) + 1)


def split_by_sign(batch: ChunkBatch) -> tuple[ChunkBatch, ChunkBatch]:
  """The batch with the positive trajectories' reinforced chunks alone, and with the others' alone.

  The rest has its returns set to 0, imitated chunks in both. Under the totals of the whole batch
  the gradients of the two add up to that of the reinforcement term; their norms tell which side
  drives the update.
  """
  positive_BxC, il_BxC = batch.positive.astype(bool), batch.il_mask.astype(bool)

  def only(keep_BxC: chex.Array) -> ChunkBatch:
    return dataclasses.replace(batch, returns=jnp.where(keep_BxC & ~il_BxC, batch.returns, 0))

  return only(positive_BxC), only(~positive_BxC)


def _reinforced(batch: ChunkBatch) -> chex.Array:
  lengths_BxC = chunk_lengths(batch.chunk_ids, batch.positive.shape[1])
  return (lengths_BxC > 0) & ~batch.il_mask.astype(bool)


def _rank_in_trajectory(trajectory_ids_BxC: chex.Array, counted_BxC: chex.Array) -> chex.Array:
  """Rank of each counted chunk among those of its trajectory, in order of rows and slots: [B*C]."""
  n = counted_BxC.size
  key = jnp.where(counted_BxC, trajectory_ids_BxC, n).reshape(-1).astype(jnp.int32)
  index = jax.lax.iota(jnp.int32, n)
  key, order = jax.lax.sort((key, index), num_keys=1)
  new_run = jnp.concatenate([jnp.ones(1, bool), key[1:] != key[:-1]])
  head = jax.lax.cummax(jnp.where(new_run, index, 0))
  return jnp.zeros(n, jnp.int32).at[order].set(index - head, unique_indices=True)
