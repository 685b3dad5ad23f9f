"""Baselines with clipped ratios: GRPO, DAPO, GSPO, CISPO, GiGPO.

Each is a drop-in for `ipa_loss`: same arguments, same metrics, same imitation term. `batch.returns`
is the advantage of a chunk, taken over groups before packing: by `shaped_returns` with
`centre="group"` (GRPO with `scale="group"`, without deviation Dr. GRPO), or by `gigpo_advantages`.
Ratios are pi_theta/pi_old, exactly 1 with their full gradient where the batch is on-policy.

  estimator  ratio       clip of PPO's kind            Z of the reinforcement term
  grpo       token       [1 - 0.2, 1 + 0.2]            trajectories, each the mean of its tokens
  dapo       token       [1 - 0.2, 1 + 0.28]           tokens
  gspo       trajectory  [1 - 3e-4, 1 + 4e-4]          trajectories, each the mean of its tokens
  cispo      token       none; weight in [0, 1 + 4]    tokens
  gigpo      token       [1 - 0.2, 1 + 0.2]            chunks (steps), each the mean of its tokens

All read lambda_rl, clip_lower and clip_upper (None: the table), kl_weight and entropy_weight, and
for the imitation term lambda_il, il_weight and normaliser; Z_rl is the table's, and no mask is
applied: mask_upper and mask_lower are not read. Left out: the papers' own KL estimators, in whose
place is the `regulariser` that all estimators have; and PPO's dual clip: a negative advantage with
an exploding ratio is as unbounded as in the papers.

Choice: where a paper averages within a group of samples and then over groups (DAPO, CISPO), the
batch takes the place of the group, as token counts are global here.
"""

import math

import chex
import jax
import jax.numpy as jnp

from rome.ipa.batch import ChunkBatch
from rome.ipa.config import IPAConfig
from rome.ipa.terms import Terms, hybrid_loss, read_terms, token_metrics, trajectory_log_ratio
from rome.ipa.totals import Totals


def grpo(
  logp_BxT: chex.Array,
  batch: ChunkBatch,
  config: IPAConfig,
  totals: Totals | None = None,
  entropy_BxT: chex.Array | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Group relative policy optimization (Eq. 3, arXiv:2402.03300).

  J = mean_i mean_{t in tau_i} min(r_t A, clip(r_t, 1 - e, 1 + e) A). Choice: e = 0.2, PPO's, as the
  paper prints none. Arguments and results as in `ipa_loss`.
  """
  terms = read_terms(logp_BxT, batch, totals, entropy_BxT)
  return _ppo_clip(terms, config, terms.log_ratio_BxT, (0.2, 0.2), "trajectory_mean")


def dapo(
  logp_BxT: chex.Array,
  batch: ChunkBatch,
  config: IPAConfig,
  totals: Totals | None = None,
  entropy_BxT: chex.Array | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """GRPO with a higher upper bound and one mean over all tokens (Eq. 8, arXiv:2503.14476).

  The loss only; DAPO's dynamic sampling and overlong rules belong to who makes the batch (see
  `truncated_episodes`). Arguments and results as in `ipa_loss`.
  """
  terms = read_terms(logp_BxT, batch, totals, entropy_BxT)
  return _ppo_clip(terms, config, terms.log_ratio_BxT, (0.2, 0.28), "token_mean")


def gspo(
  logp_BxT: chex.Array,
  batch: ChunkBatch,
  config: IPAConfig,
  totals: Totals | None = None,
  entropy_BxT: chex.Array | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Group sequence policy optimization: one ratio a trajectory (arXiv:2507.18071).

  s(tau) is the geometric mean of token ratios over the whole trajectory, which has to lie in this
  slice whole. Choice: the paper's GSPO-token form, s_t = sg(s(tau)) pi_theta,t / sg(pi_theta,t),
  as chunks of a trajectory may differ in advantage; where they do not, value, clipping and gradient
  are GSPO's. Arguments and results as in `ipa_loss`.
  """
  terms = read_terms(logp_BxT, batch, totals, entropy_BxT)
  log_ratio_BxT = (
    trajectory_log_ratio(terms) + terms.logp_BxT - jax.lax.stop_gradient(terms.logp_BxT)
  )
  return _ppo_clip(terms, config, log_ratio_BxT, (3e-4, 4e-4), "trajectory_mean")


def cispo(
  logp_BxT: chex.Array,
  batch: ChunkBatch,
  config: IPAConfig,
  totals: Totals | None = None,
  entropy_BxT: chex.Array | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Clipped importance weights: J = mean_t sg(clip(r_t)) A logp_t (Eqs. 4-5, arXiv:2506.13585).

  No token loses its gradient; only its weight is bounded. The paper has no lower bound (a
  clip_lower of 1 here) and prints no upper one. Choice: weights up to 5. Arguments and results as
  in `ipa_loss`.
  """
  terms = read_terms(logp_BxT, batch, totals, entropy_BxT)
  log_lower, log_upper = _log_bounds(config, (1.0, 4.0))
  log_ratio_BxT = jax.lax.stop_gradient(terms.log_ratio_BxT)
  weight_BxT = jnp.exp(jnp.clip(log_ratio_BxT, log_lower, log_upper))
  cut_BxT = (log_ratio_BxT < log_lower) | (log_ratio_BxT > log_upper)
  objective_BxT = weight_BxT * terms.returns_BxT * terms.logp_BxT
  return _finish(terms, config, objective_BxT, "token_mean", log_ratio_BxT, weight_BxT, cut_BxT)


def gigpo(
  logp_BxT: chex.Array,
  batch: ChunkBatch,
  config: IPAConfig,
  totals: Totals | None = None,
  entropy_BxT: chex.Array | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Group-in-group policy optimization, on advantages of `gigpo_advantages` (arXiv:2505.10978).

  J = mean over steps of min(r A, clip(r, 1 - e, 1 + e) A); a step is a chunk. Choice: r of single
  tokens, averaged over the step's, as for the paper's r of an action that is a string of tokens;
  e = 0.2. Arguments and results as in `ipa_loss`.
  """
  terms = read_terms(logp_BxT, batch, totals, entropy_BxT)
  return _ppo_clip(terms, config, terms.log_ratio_BxT, (0.2, 0.2), "chunk_mean")


def _log_bounds(config: IPAConfig, clip: tuple[float, float]) -> tuple[float, float]:
  """Logarithms of 1 - clip_lower and 1 + clip_upper; `clip` is the paper's pair."""
  lower = clip[0] if config.clip_lower is None else config.clip_lower
  upper = clip[1] if config.clip_upper is None else config.clip_upper
  return math.log1p(-lower) if lower < 1 else -math.inf, math.log1p(upper)


def _ppo_clip(
  terms: Terms,
  config: IPAConfig,
  log_ratio_BxT: chex.Array,
  clip: tuple[float, float],
  normaliser: str,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """min(r A, clip(r) A) a token (arXiv:1707.06347).

  For A >= 0 the minimum bounds r from above, else from below: so only that side is clipped, and on
  the logarithm, where a clipped ratio can overflow neither the value nor the gradient.
  """
  log_lower, log_upper = _log_bounds(config, clip)
  gains_BxT = terms.returns_BxT >= 0
  cut_BxT = jnp.where(gains_BxT, log_ratio_BxT > log_upper, log_ratio_BxT < log_lower)
  bound_BxT = jnp.where(gains_BxT, log_upper, log_lower).astype(log_ratio_BxT.dtype)
  ratio_BxT = jnp.exp(jnp.where(cut_BxT, bound_BxT, log_ratio_BxT))
  objective_BxT = ratio_BxT * terms.returns_BxT
  weight_BxT = jnp.where(cut_BxT, 0, ratio_BxT)
  # Without an advantage there is no gradient that a clip could cut.
  cut_BxT &= terms.returns_BxT != 0
  return _finish(terms, config, objective_BxT, normaliser, log_ratio_BxT, weight_BxT, cut_BxT)


def _finish(
  terms: Terms,
  config: IPAConfig,
  objective_BxT: chex.Array,
  normaliser: str,
  log_ratio_BxT: chex.Array,
  weight_BxT: chex.Array,
  cut_BxT: chex.Array,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  loss, metrics = hybrid_loss(terms, config, normaliser, objective_BxT)
  kept_BxT = jnp.ones_like(terms.rl_BxT)
  metrics |= token_metrics(terms, log_ratio_BxT, weight_BxT, cut_BxT, kept_BxT)
  return loss, jax.lax.stop_gradient(metrics)
