"""The control arm: REINFORCE with truncated ratios over whole trajectories (Eqs. 3-6).

The objectives that the paper compares its chunks with (section 3.2.4 of arXiv:2512.24873), and
RLOO. Each is a drop-in for `ipa_loss`: same arguments, same metrics, same imitation term, no
gradient through weights. `batch.returns` is the return or advantage of a chunk; with gamma = 1 and
a reward at the end every chunk of a trajectory holds R(tau).

All read lambda_rl, lambda_il, il_weight, kl_weight, entropy_weight and normaliser; only `topr`
reads mask_upper and mask_lower, and none reads clip_lower or clip_upper. Choice: Z is the setting,
as for `ipa_loss`, so that an ablation changes one thing; `trajectory_sum` is the average over
trajectories that the equations have. The clipped family is in `rome.ipa.clipped`.
"""

import chex
import jax
import jax.numpy as jnp

from rome.ipa.batch import ChunkBatch
from rome.ipa.config import IPAConfig
from rome.ipa.ratios import mismatch_mask, truncated_weight
from rome.ipa.terms import Terms, hybrid_loss, read_terms, token_metrics, trajectory_log_ratio
from rome.ipa.totals import Totals


def reinforce(
  logp_BxT: chex.Array,
  batch: ChunkBatch,
  config: IPAConfig,
  totals: Totals | None = None,
  entropy_BxT: chex.Array | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """REINFORCE: R(tau) grad log pi(tau), with no ratio and no mask (Eq. 3, arXiv:2512.24873).

  Arguments and results as in `ipa_loss`; `ratio_mean` is of token ratios.
  """
  terms = read_terms(logp_BxT, batch, totals, entropy_BxT)
  everything_BxT = jnp.ones_like(terms.rl_BxT)
  log_ratio_BxT = terms.log_ratio_BxT
  weight_BxT = jnp.ones_like(log_ratio_BxT)
  return _weighted(terms, config, weight_BxT, log_ratio_BxT, ~everything_BxT, everything_BxT)


def tis(
  logp_BxT: chex.Array,
  batch: ChunkBatch,
  config: IPAConfig,
  totals: Totals | None = None,
  entropy_BxT: chex.Array | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Truncated importance sampling: weight [rho(tau)]_0^1 on all (Eq. 4, arXiv:2512.24873).

  rho(tau) is the geometric mean of pi_theta/pi_old over the whole trajectory, which has to lie in
  this slice whole. Arguments and results as in `ipa_loss`.
  """
  terms = read_terms(logp_BxT, batch, totals, entropy_BxT)
  log_ratio_BxT = trajectory_log_ratio(terms)
  nothing_BxT = jnp.zeros_like(terms.rl_BxT)
  weight_BxT = truncated_weight(log_ratio_BxT, nothing_BxT)
  return _weighted(terms, config, weight_BxT, log_ratio_BxT, log_ratio_BxT > 0, ~nothing_BxT)


def topr(
  logp_BxT: chex.Array,
  batch: ChunkBatch,
  config: IPAConfig,
  totals: Totals | None = None,
  entropy_BxT: chex.Array | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Positives unweighted, negatives by [rho(tau)]_0^1, with a token mask (Eqs. 5-6).

  Eq. 6 of arXiv:2512.24873: m_t = 1[pi_old/mu <= H] takes single tokens out, of positives and of
  negatives, where `ipa_loss` takes whole chunks; H = inf gives Eq. 5. H is mask_upper, and
  mask_lower bounds the same band from below. rho(tau) as in `tis`. Arguments and results as in
  `ipa_loss`.
  """
  terms = read_terms(logp_BxT, batch, totals, entropy_BxT)
  log_ratio_BxT = trajectory_log_ratio(terms)
  kept_BxT = mismatch_mask(terms.log_mismatch_BxT, config.mask_lower, config.mask_upper)
  weight_BxT = jnp.where(kept_BxT, truncated_weight(log_ratio_BxT, terms.positive_BxT), 0.0)
  cut_BxT = ~terms.positive_BxT & (log_ratio_BxT > 0)
  return _weighted(terms, config, weight_BxT, log_ratio_BxT, cut_BxT, kept_BxT)


def rloo(
  logp_BxT: chex.Array,
  batch: ChunkBatch,
  config: IPAConfig,
  totals: Totals | None = None,
  entropy_BxT: chex.Array | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """REINFORCE leave-one-out (arXiv:2402.14740): `reinforce` on returns that hold R_i - mean_{j!=i}.

  The baseline is taken before packing, by `shaped_returns` with `centre="leave_one_out"`; nothing
  in the loss differs. Arguments and results as in `ipa_loss`.
  """
  return reinforce(logp_BxT, batch, config, totals, entropy_BxT)


def _weighted(
  terms: Terms,
  config: IPAConfig,
  weight_BxT: chex.Array,
  log_ratio_BxT: chex.Array,
  cut_BxT: chex.Array,
  kept_BxT: chex.Array,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """The surrogate sum_t sg(w_t G_c) logp_t over Z, and its metrics."""
  objective_BxT = jax.lax.stop_gradient(weight_BxT) * terms.returns_BxT * terms.logp_BxT
  loss, metrics = hybrid_loss(terms, config, config.normaliser, objective_BxT)
  metrics |= token_metrics(terms, log_ratio_BxT, weight_BxT, cut_BxT, kept_BxT)
  return loss, jax.lax.stop_gradient(metrics)
