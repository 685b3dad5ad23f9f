"""IPA, Interaction-Perceptive Agentic Policy Optimization: arrays in, arrays out.

The algorithm of "Let It Flow: Agentic Crafting on Rock and Roll" (arXiv:2512.24873, section 3.2.4)
as pure functions that jit: chunk segmentation, chunk returns (Eq. 7), chunk ratios and the mismatch
mask (Eq. 8), the loss (Eqs. 9-10) and the supervised loss (Eq. 1). No model, no I/O, no clock, no
randomness.

Suffixes of array names are shapes: B packed rows, T tokens a row, C chunk slots a row; N
trajectories, K chunks a trajectory.
"""

from rome.ipa.batch import ChunkBatch, validate
from rome.ipa.chunks import chunk_lengths, chunk_sums, segment_chunks, spread_to_tokens
from rome.ipa.config import NORMALISERS, IPAConfig
from rome.ipa.diagnostics import reduce_metrics
from rome.ipa.loss import ipa_loss, sft_loss
from rome.ipa.ratios import chunk_log_ratio, mismatch_mask, truncated_weight
from rome.ipa.returns import discounted_chunk_returns, shaped_returns
from rome.ipa.totals import TermTotals, Totals, loss_totals

__all__ = (
  "NORMALISERS",
  "ChunkBatch",
  "IPAConfig",
  "TermTotals",
  "Totals",
  "chunk_lengths",
  "chunk_log_ratio",
  "chunk_sums",
  "discounted_chunk_returns",
  "ipa_loss",
  "loss_totals",
  "mismatch_mask",
  "reduce_metrics",
  "segment_chunks",
  "sft_loss",
  "shaped_returns",
  "spread_to_tokens",
  "truncated_weight",
  "validate",
)
