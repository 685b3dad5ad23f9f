"""The IPA loss (Eqs. 9-10) and the supervised loss (Eq. 1), arXiv:2512.24873.

Left out: a critic and a PPO clip, which the equations do not have (`rome.ipa.clipped` has the
estimators that do); return shaping, which whole trajectories get before they are packed
(`shaped_returns`); the mode of the imitation term (whoever builds the batch decides which chunks
are imitated).
"""

import chex
import jax
import jax.numpy as jnp

from rome.ipa.batch import ChunkBatch
from rome.ipa.chunks import at_least_float32, spread_to_tokens
from rome.ipa.config import IPAConfig
from rome.ipa.diagnostics import policy_metrics
from rome.ipa.ratios import chunk_ratios
from rome.ipa.terms import hybrid_loss, read_terms
from rome.ipa.totals import Totals


def ipa_loss(
  logp_BxT: chex.Array,
  batch: ChunkBatch,
  config: IPAConfig,
  totals: Totals | None = None,
  entropy_BxT: chex.Array | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Chunk-level policy loss with an imitation term (Eqs. 9-10, arXiv:2512.24873).

  The surrogate whose gradient is minus Eq. 9:
    L_rl = -(1/Z) sum_c sum_{t in c} sg(m_c w_c G_c) logp_t
  over reinforced chunks, where w_c = 1 if positive, else min(rho_c, 1); and with a Z of its own
    L_il = -(1/Z_il) sum_c sum_{t in c} sg(f_c G_c) logp_t
  over imitated ones, where f_c = 1, or pi_theta(c) by `config.il_weight`. Together: lambda_rl L_rl
  + lambda_il L_il, and the `regulariser` where a weight of it is not 0. No gradient flows through
  rho_c, m_c, G_c or f_c, and none reaches a token outside every chunk. Positive chunks carry no
  ratio.

  Args:
    logp_BxT: log-prob of every token under pi_theta, computed by the same temperature and filters
      as it was sampled with. Not read outside chunks. The loss is computed in at least float32.
    batch: returns already discounted and shaped. `old_logp=None` (on-policy) makes every ratio
      exactly 1.
    config: static.
    totals: global counts, so that slices of a batch sum to the whole. None: this batch is the
      whole.
    entropy_BxT: entropy in nats of the distribution that each token was drawn from; needed by
      `config.entropy_weight` > 0, else not read.

  Returns:
    (loss, metrics): scalars. Metrics are loss_rl, loss_il and loss_regulariser (the parts of the
    loss), tokens, chunks, il_tokens (counts of this slice) and those of `policy_metrics`;
    `reduce_metrics` puts the metrics of slices together.
  """
  terms = read_terms(logp_BxT, batch, totals, entropy_BxT)
  ratios = chunk_ratios(terms.logp_BxT, batch, config)
  weight_BxC = ratios.weight_BxC * batch.returns
  loss, metrics = hybrid_loss(terms, config, config.normaliser, weight_BxC=weight_BxC)
  mismatch_BxT, positive_BxC = jnp.abs(terms.log_mismatch_BxT), batch.positive.astype(bool)
  metrics |= policy_metrics(mismatch_BxT, ratios, positive_BxC, terms.rl_BxC, terms.totals.rl)
  return loss, jax.lax.stop_gradient(metrics)


def sft_loss(
  logp_BxT: chex.Array, chunk_ids_BxT: chex.Array, chunk_mask_BxC: chex.Array
) -> tuple[chex.Array, chex.Array]:
  """Supervised loss over the chunks that are kept (Eq. 1, arXiv:2512.24873), not yet divided.

  L = -sum_k m_k log pi(c_k | s_k) / sum_k m_k |c_k|: sum both results over micro-batches, then
  divide (by at least 1, which stands for the paper's epsilon).

  Args:
    logp_BxT: log-prob of every token under the model; not read outside chunks.
    chunk_ids_BxT: int, -1 outside chunks, else 0..C-1.
    chunk_mask_BxC: bool or float weight m_k of each chunk, such as 0 for a turn that raised an
      error. Constant: no gradient flows through it.

  Returns:
    (sum, weight): -sum_k m_k sum_{t in c_k} logp_t and sum_k m_k |c_k|, scalars.
  """
  chex.assert_rank([logp_BxT, chunk_ids_BxT, chunk_mask_BxC], 2)
  chex.assert_equal_shape([logp_BxT, chunk_ids_BxT])
  chex.assert_equal_shape_prefix([chunk_ids_BxT, chunk_mask_BxC], 1)
  mask_BxC = jax.lax.stop_gradient(at_least_float32(chunk_mask_BxC))
  weight_BxT = spread_to_tokens(mask_BxC, chunk_ids_BxT)
  logp_BxT = jnp.where(chunk_ids_BxT >= 0, at_least_float32(logp_BxT), 0)
  return -(weight_BxT * logp_BxT).sum(), weight_BxT.sum()
