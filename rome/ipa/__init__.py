"""IPA, Interaction-Perceptive Agentic Policy Optimization: arrays in, arrays out.

The algorithm of "Let It Flow: Agentic Crafting on Rock and Roll" (arXiv:2512.24873, section 3.2.4)
as pure functions that jit: chunk segmentation, chunk returns (Eq. 7), chunk ratios and the mismatch
mask (Eq. 8), the loss (Eqs. 9-10) and nine estimators to compare it with, the supervised loss
(Eq. 1), and resampling from expert trajectories as state machines. No model, no I/O, no clock, no
randomness but from keys.

Suffixes of array names are shapes: B packed rows, T tokens a row, C chunk slots a row; N
trajectories, K chunks a trajectory.
"""

from rome.ipa.advantages import gigpo_advantages
from rome.ipa.baselines import reinforce, rloo, tis, topr
from rome.ipa.batch import ChunkBatch, validate
from rome.ipa.branching import branch_baseline
from rome.ipa.chunks import chunk_lengths, chunk_sums, segment_chunks, spread_to_tokens
from rome.ipa.clipped import cispo, dapo, gigpo, grpo, gspo
from rome.ipa.config import NORMALISERS, IPAConfig
from rome.ipa.diagnostics import (
  effective_sample_share,
  episode_profile,
  mismatch_by_position,
  mismatch_profile,
  ratio_histogram,
  reduce_metrics,
  split_by_sign,
)
from rome.ipa.estimators import ESTIMATORS, check_estimator
from rome.ipa.experts import (
  ExpertState,
  drop_prefix,
  imitated_experts,
  imitation_prefix_mask,
  no_experts,
  refresh_experts,
)
from rome.ipa.loss import ipa_loss, sft_loss
from rome.ipa.ratios import (
  ChunkRatios,
  chunk_log_ratio,
  chunk_ratios,
  mismatch_mask,
  truncated_weight,
)
from rome.ipa.resampling import (
  ResamplingConfig,
  RollbackState,
  anchor_starts,
  crucial_chunks,
  rollback_init,
  rollback_refresh,
  rollback_update,
)
from rome.ipa.returns import discounted_chunk_returns, shaped_returns
from rome.ipa.terms import regulariser
from rome.ipa.totals import TermTotals, Totals, loss_totals

__all__ = (
  "ChunkBatch",
  "ChunkRatios",
  "ESTIMATORS",
  "ExpertState",
  "IPAConfig",
  "NORMALISERS",
  "ResamplingConfig",
  "RollbackState",
  "TermTotals",
  "Totals",
  "anchor_starts",
  "branch_baseline",
  "check_estimator",
  "chunk_lengths",
  "chunk_log_ratio",
  "chunk_ratios",
  "chunk_sums",
  "cispo",
  "crucial_chunks",
  "dapo",
  "discounted_chunk_returns",
  "drop_prefix",
  "effective_sample_share",
  "episode_profile",
  "gigpo",
  "gigpo_advantages",
  "grpo",
  "gspo",
  "imitated_experts",
  "imitation_prefix_mask",
  "ipa_loss",
  "loss_totals",
  "mismatch_by_position",
  "mismatch_mask",
  "mismatch_profile",
  "no_experts",
  "ratio_histogram",
  "reduce_metrics",
  "refresh_experts",
  "regulariser",
  "reinforce",
  "rloo",
  "rollback_init",
  "rollback_refresh",
  "rollback_update",
  "segment_chunks",
  "sft_loss",
  "shaped_returns",
  "split_by_sign",
  "spread_to_tokens",
  "tis",
  "topr",
  "truncated_weight",
  "validate",
)
