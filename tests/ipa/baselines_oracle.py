"""The baselines in numpy float64, token by token, from the papers' equations.

Each estimator is J = (1/Z) sum_t value_t with slope_t = d value_t / d logp_t written by hand; a
weight that its paper holds constant adds no slope.
"""

import dataclasses
import math

import numpy as np

from tests.ipa import oracle

CLIPS = {
  "grpo": (0.2, 0.2),
  "dapo": (0.2, 0.28),
  "gspo": (3e-4, 4e-4),
  "cispo": (1.0, 4.0),
  "gigpo": (0.2, 0.2),
}
Z = {
  "grpo": "trajectory_mean",
  "dapo": "token_mean",
  "gspo": "trajectory_mean",
  "cispo": "token_mean",
  "gigpo": "chunk_mean",
}
NAMES = ("reinforce", "tis", "topr", "rloo", *CLIPS)


@dataclasses.dataclass
class Token:
  row: int
  column: int
  slot: int
  size: int  # tokens of its chunk
  trajectory: int
  ret: float
  positive: bool
  logp: float
  ratio: float  # pi_theta/pi_old
  engine: float  # pi_old/mu
  gap: float  # logp - ref_logp
  entropy: float


@dataclasses.dataclass
class Expected(oracle.Expected):
  """`ratios` holds (value, bound) pairs: each comparison that rounding could decide otherwise."""


def expected(name, logp_BxT, batch, config, entropy_BxT=None) -> Expected:
  """The loss of estimator `name`, its gradient and its metrics, with all terms."""
  reinforced, imitated = _tokens(logp_BxT, batch, entropy_BxT)
  out = Expected(0.0, np.zeros(np.shape(logp_BxT)), 0.0, [], {})
  whole = _trajectory_ratios(reinforced)
  z_rl = _normaliser(Z.get(name, config.normaliser), reinforced)
  ratio_sum, weights, masked, cut = 0.0, [], 0, 0
  for token in reinforced:
    value, slope, ratio, is_masked, is_cut, close = _term(name, token, whole, config)
    value = config.lambda_rl * value - config.kl_weight * token.gap**2 / 2
    weights.append(slope / token.ret)
    slope = config.lambda_rl * slope - config.kl_weight * token.gap
    value += config.entropy_weight * token.entropy
    _add(out, token, value / z_rl(token), slope / z_rl(token))
    out.ratios += close
    ratio_sum, masked, cut = ratio_sum + ratio, masked + is_masked, cut + is_cut

  z_il = _normaliser(config.normaliser, imitated)
  for token in imitated:
    same = [t for t in imitated if (t.row, t.slot) == (token.row, token.slot)]
    factor = math.exp(sum(t.logp for t in same)) if config.il_weight == "policy" else 1.0
    strength = config.lambda_il * factor * token.ret / z_il(token)
    _add(out, token, strength * token.logp, strength)

  count = max(len(reinforced), 1)
  chunks = sum(1 / t.size for t in reinforced)
  mismatch = [abs(math.log(t.engine)) for t in reinforced]
  out.metrics = {
    "masked_share": masked / count,
    "truncated_share": cut / count,
    "ratio_mean": ratio_sum / count,
    "weight_mean": sum(weights) / count,
    "weight_square_mean": sum(w * w for w in weights) / count,
    "positive_share": sum(t.positive / t.size for t in reinforced) / max(chunks, 1),
    "mismatch_mean": sum(mismatch) / count,
    "mismatch_max": max(mismatch, default=0.0),
    "chunks": chunks,
    "tokens": len(reinforced),
    "il_tokens": len(imitated),
  }
  return out


def _add(out, token, value, slope):
  out.loss -= value
  out.scale += abs(value)
  out.grad[token.row, token.column] = -slope


def _tokens(logp_BxT, batch, entropy_BxT):
  logp = np.asarray(logp_BxT, np.float64)
  old = logp if batch.old_logp is None else np.asarray(batch.old_logp, np.float64)
  behavior = np.asarray(batch.behavior_logp, np.float64)
  ref = logp if batch.ref_logp is None else np.asarray(batch.ref_logp, np.float64)
  reinforced, imitated = [], []
  for row, ids in enumerate(np.asarray(batch.chunk_ids)):
    for column, slot in enumerate(ids):
      if slot < 0:
        continue
      il = bool(batch.il_mask[row, slot])
      token = Token(
        row=row,
        column=column,
        slot=int(slot),
        size=int((ids == slot).sum()),
        trajectory=int(batch.trajectory_ids[row, slot]),
        ret=float(batch.returns[row, slot]),
        positive=bool(batch.positive[row, slot]),
        logp=logp[row, column],
        ratio=1.0 if il else math.exp(logp[row, column] - old[row, column]),
        gap=logp[row, column] - ref[row, column],
        entropy=0.0 if entropy_BxT is None else float(entropy_BxT[row, column]),
        engine=1.0 if il else math.exp(old[row, column] - behavior[row, column]),
      )
      (imitated if il else reinforced).append(token)
  return reinforced, imitated


def _trajectory_ratios(tokens):
  """rho(tau), the geometric mean of Eq. 4, as the root of a product of logs."""
  logs = {}
  for token in tokens:
    logs.setdefault(token.trajectory, []).append(math.log(token.ratio))
  return {name: math.exp(sum(values) / len(values)) for name, values in logs.items()}


def _normaliser(name, tokens):
  lengths = {}
  for token in tokens:
    lengths[token.trajectory] = lengths.get(token.trajectory, 0) + 1
  chunks = sum(1 / t.size for t in tokens)
  return {
    "token_mean": lambda t: len(tokens),
    "trajectory_sum": lambda t: len(lengths),
    "chunk_mean": lambda t: chunks * t.size,
    "trajectory_mean": lambda t: len(lengths) * lengths[t.trajectory],
  }[name]


def _term(name, token, whole, config):
  """(value, slope, ratio looked at, masked, cut, comparisons) of one token."""
  g, rho = token.ret, whole[token.trajectory]
  if name in ("reinforce", "rloo"):
    return g * token.logp, g, token.ratio, False, False, []
  if name == "tis":
    w = min(max(rho, 0.0), 1.0)
    return w * g * token.logp, w * g, rho, False, rho > 1, []
  if name == "topr":
    w = 1.0 if token.positive else min(max(rho, 0.0), 1.0)
    kept = config.mask_lower <= token.engine <= config.mask_upper
    close = [(token.engine, bound) for bound in (config.mask_lower, config.mask_upper)]
    cut = not token.positive and rho > 1
    return kept * w * g * token.logp, kept * w * g, rho, not kept, cut, close

  lower, upper = CLIPS[name]
  low = 1 - (lower if config.clip_lower is None else config.clip_lower)
  high = 1 + (upper if config.clip_upper is None else config.clip_upper)
  ratio = rho if name == "gspo" else token.ratio
  bounded = min(max(ratio, low), high)
  close = [(ratio, low), (ratio, high)]
  if name == "cispo":
    cut = not low <= ratio <= high
    return bounded * g * token.logp, bounded * g, ratio, False, cut, close
  # min(r A, clip(r) A), and d r / d logp = r: for GSPO-token too, whose token carries all of it.
  free, clipped = ratio * g, bounded * g
  cut = clipped < free
  return min(free, clipped), 0.0 if cut else free, ratio, False, cut, close
