"""The settings of the IPA loss and of its returns, checked once when they are made.

A setting is here only if a function of this package reads it. Schedules of the loop (learning rate,
group size, staleness) belong to the trainer.
"""

import dataclasses
import math

import chex
import jax.numpy as jnp

NORMALISERS = ("token_mean", "trajectory_sum", "chunk_mean", "trajectory_mean")
IL_WEIGHTS = ("one", "policy")
CENTRES = ("none", "group", "batch", "leave_one_out")
SCALES = ("none", "group", "batch")
TRUNCATED = ("keep", "mask_negative", "mask")


@dataclasses.dataclass(frozen=True)
class IPAConfig:
  """Settings of `ipa_loss` and `shaped_returns`; hashable, so that jit can take it as static.

  Attributes:
    gamma: discount per chunk, in (0, 1] (Eq. 7).
    mask_upper: H of Eq. 8, > 0; a chunk whose geometric-mean pi_old/mu exceeds it leaves the loss.
      inf: no bound.
    mask_lower: lower bound of the same band, in [0, mask_upper]. Choice: 0, as the paper has an
      upper bound only.
    normaliser: Z of either term. Choice: token_mean, the direction of Eq. 9 at a scale that does
      not depend on the batch's size. `trajectory_sum` (Z = number of trajectories) is the only
      unbiased one on-policy with gamma = 1; `chunk_mean` and `trajectory_mean` weigh every chunk or
      trajectory alike, whatever its length.
    failure_reward: added to the last chunk's reward of a non-positive trajectory, <= 0. 0 makes the
      negatives' sum vanish (positive-only learning), -1 makes it act.
    negative_start_step: first update, counted from 0, at which non-positive trajectories take part.
    negative_weight: factor on the returns of non-positive trajectories from then on, >= 0.
    centre: what is taken from a trajectory's reward before it is discounted: "none", the mean of
      its "group" or of the "batch", or the mean of the others of its group ("leave_one_out"). The
      last leaves the gradient unbiased with gamma = 1; a discounted baseline pushes the policy to
      stop sooner or later.
    scale: what returns are divided by: "none", or the standard deviation of the rewards of the
      "group" or of the "batch".
    advantage_clip: returns end in [-advantage_clip, advantage_clip], > 0; inf: no bound.
    truncated_episodes: what an episode teaches that a limit of turns or tokens cut off: "keep", as
      any other; "mask_negative", nothing unless it is positive (overlong-negative masking, DAPO);
      "mask", nothing. Choice: "keep"; a policy that never ends has failed.
    kl_weight: weight of the penalty 0.5 (logp - ref_logp)^2 a token, >= 0. Its gradient is, on
      average and on-policy, that of KL(pi_theta || pi_ref) at each context (k2 of Schulman,
      "Approximating KL Divergence", 2020). Needs `ChunkBatch.ref_logp`. Choice: 0.
    entropy_weight: weight of the entropy bonus a token, >= 0. Needs `entropy_BxT`. Choice: 0.
    clip_lower, clip_upper: ratios are clipped to [1 - clip_lower, 1 + clip_upper] by the
      estimators of `rome.ipa.clipped`; None: the value of each one's paper. `ipa_loss`
      has no clip.
    lambda_rl: weight of the reinforcement term of Eq. 10, >= 0.
    lambda_il: weight of the imitation term of Eq. 10, >= 0; 0 leaves Eq. 9.
    il_weight: "one", or "policy" for the paper's literal factor pi_theta(c*) on an imitated chunk,
      which is vanishingly small for chunks of more than a few tokens. Choice: "one".
  """

  gamma: float = 0.95
  mask_upper: float = 5.0
  mask_lower: float = 0.0
  normaliser: str = "token_mean"
  failure_reward: float = 0.0
  negative_start_step: int = 0
  negative_weight: float = 1.0
  centre: str = "none"
  scale: str = "none"
  advantage_clip: float = math.inf
  truncated_episodes: str = "keep"
  kl_weight: float = 0.0
  entropy_weight: float = 0.0
  clip_lower: float | None = None
  clip_upper: float | None = None
  lambda_rl: float = 1.0
  lambda_il: float = 0.1
  il_weight: str = "one"

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is float:
        self._require(field.name, _is_number(value), "a number")
    step = self.negative_start_step
    self._require("negative_start_step", type(step) is int and step >= 0, "an int >= 0")
    self._require("gamma", 0 < self.gamma <= 1, "in (0, 1]")
    self._require("mask_upper", self.mask_upper > 0, "> 0")
    self._require("mask_lower", 0 <= self.mask_lower <= self.mask_upper, "in [0, mask_upper]")
    self._require("failure_reward", -math.inf < self.failure_reward <= 0, "finite and <= 0")
    for name in ("negative_weight", "kl_weight", "entropy_weight", "lambda_rl", "lambda_il"):
      self._require(name, 0 <= getattr(self, name) < math.inf, "finite and >= 0")
    self._require("advantage_clip", self.advantage_clip > 0, "> 0")
    for name in ("clip_lower", "clip_upper"):
      value = getattr(self, name)
      holds = value is None or (_is_number(value) and value >= 0)
      self._require(name, holds, "None or a number >= 0")
    for name, known in (
      ("normaliser", NORMALISERS),
      ("centre", CENTRES),
      ("scale", SCALES),
      ("truncated_episodes", TRUNCATED),
      ("il_weight", IL_WEIGHTS),
    ):
      self._require(name, getattr(self, name) in known, f"one of {known}")

  def _require(self, name: str, holds: bool, what: str) -> None:
    if not holds:
      raise ValueError(f"IPAConfig.{name} must be {what}, got {getattr(self, name)!r}")

  def negative_scale(self, step: chex.Numeric) -> chex.Array:
    """Factor on non-positive trajectories' returns at update `step` (from 0; may be traced)."""
    return jnp.where(jnp.asarray(step) >= self.negative_start_step, self.negative_weight, 0.0)


def _is_number(value: object) -> bool:
  return type(value) in (int, float) and value == value  # NaN differs from itself
