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
    for name in ("negative_weight", "lambda_rl", "lambda_il"):
      self._require(name, 0 <= getattr(self, name) < math.inf, "finite and >= 0")
    self._require("normaliser", self.normaliser in NORMALISERS, f"one of {NORMALISERS}")
    self._require("il_weight", self.il_weight in IL_WEIGHTS, f"one of {IL_WEIGHTS}")

  def _require(self, name: str, holds: bool, what: str) -> None:
    if not holds:
      raise ValueError(f"IPAConfig.{name} must be {what}, got {getattr(self, name)!r}")

  def negative_scale(self, step: chex.Numeric) -> chex.Array:
    """Factor on non-positive trajectories' returns at update `step` (from 0; may be traced)."""
    return jnp.where(jnp.asarray(step) >= self.negative_start_step, self.negative_weight, 0.0)


def _is_number(value: object) -> bool:
  return type(value) in (int, float) and value == value  # NaN differs from itself
