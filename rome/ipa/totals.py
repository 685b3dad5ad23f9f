"""Global counts, and the normalisers made of them.

A loss that divides by counts of its own slice changes when the batch is cut otherwise. Here the
counts of the whole batch are taken first and passed to every slice, so that losses and gradients of
micro-batches and shards add up to those of the one batch.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from rome.ipa.batch import ChunkBatch
from rome.ipa.chunks import chunk_lengths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TermTotals:
  """Counts of one term of the loss, masked chunks included.

  Attributes:
    tokens: float scalar, tokens in chunks of this term.
    chunks: float scalar, chunks of this term.
    trajectory_tokens: float [N], tokens by trajectory id.
  """

  tokens: chex.Array
  chunks: chex.Array
  trajectory_tokens: chex.Array

  @property
  def trajectories(self) -> chex.Array:
    """Number of trajectories with a token in this term."""
    return (self.trajectory_tokens > 0).sum(dtype=self.trajectory_tokens.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
  """Counts of both terms of Eq. 10, each with its own Z.

  They add: `jax.tree.map(jnp.add, a, b)` (or a psum) of two slices' totals is the totals of both,
  wherever a trajectory was cut, as long as both were made with the same `num_trajectories`.
  """

  rl: TermTotals
  il: TermTotals


def loss_totals(batch: ChunkBatch, num_trajectories: int | None = None) -> Totals:
  """Counts what the normalisers divide by.

  Args:
    batch: the whole batch, or a slice of it whose totals will be added to the others'.
    num_trajectories: N, static: an upper bound on trajectory ids + 1. None: B*C, which bounds the
      dense ids of a whole batch but not of a slice of one.
  """
  chex.assert_rank([batch.chunk_ids, batch.trajectory_ids, batch.il_mask], 2)
  lengths_BxC = chunk_lengths(batch.chunk_ids, batch.returns.shape[1])
  if num_trajectories is None:
    num_trajectories = lengths_BxC.size
  il_mask_BxC = batch.il_mask.astype(bool)

  def count(keep_BxC: chex.Array) -> TermTotals:
    kept_BxC = jnp.where(keep_BxC, lengths_BxC, 0)
    by_trajectory = jax.ops.segment_sum(
      kept_BxC.reshape(-1), batch.trajectory_ids.reshape(-1), num_segments=num_trajectories
    )
    return TermTotals(
      tokens=kept_BxC.sum(),
      chunks=(kept_BxC > 0).sum(dtype=kept_BxC.dtype),
      trajectory_tokens=by_trajectory,
    )

  return Totals(rl=count(~il_mask_BxC), il=count(il_mask_BxC))


def inverse_normaliser(
  normaliser: str, lengths_BxC: chex.Array, trajectory_ids_BxC: chex.Array, totals: TermTotals
) -> chex.Array:
  """1/Z of every chunk: the factor on the sum of its tokens' losses.

  Args:
    normaliser: `token_mean` (Z = tokens), `trajectory_sum` (Z = trajectories), `chunk_mean` (mean
      over chunks of their token mean) or `trajectory_mean` (mean over trajectories of their token
      mean).
    lengths_BxC: tokens of each chunk.
    trajectory_ids_BxC: int, read by `trajectory_mean` only.
    totals: global counts of the term.

  Returns:
    [B, C]; finite also where there is nothing to count. A trajectory id beyond N gives NaN under
    `trajectory_mean` rather than a wrong weight.
  """
  chex.assert_rank([lengths_BxC, trajectory_ids_BxC], 2)
  chex.assert_equal_shape([lengths_BxC, trajectory_ids_BxC])
  if normaliser == "token_mean":
    z_BxC = jnp.full_like(lengths_BxC, totals.tokens)
  elif normaliser == "trajectory_sum":
    z_BxC = jnp.full_like(lengths_BxC, totals.trajectories)
  elif normaliser == "chunk_mean":
    z_BxC = totals.chunks * lengths_BxC
  elif normaliser == "trajectory_mean":
    used_BxC = jnp.where(lengths_BxC > 0, trajectory_ids_BxC, 0)
    tokens_BxC = totals.trajectory_tokens.at[used_BxC].get(mode="fill", fill_value=jnp.nan)
    z_BxC = totals.trajectories * tokens_BxC
  else:
    raise ValueError(f"unknown normaliser {normaliser!r}")
  return 1 / jnp.maximum(z_BxC, 1)
