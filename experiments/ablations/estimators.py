"""The estimators that are compared: a loss of `rome.ipa`, its settings, its advantages.

What defines an estimator is all that differs between two of them: ratio, mask, clip, normaliser,
discount, baseline. Data, optimiser, epochs and warm start are shared.
"""

import dataclasses

import chex
import jax.numpy as jnp

from experiments.ablations import policy
from rome import ipa

# H, for those that mask. The paper prints none; at the repository's default of 5 no token of these
# runs is ever masked, and Eqs. 5 and 6 would be one estimator.
MASK_UPPER = 1.2


@dataclasses.dataclass(frozen=True)
class Estimator:
  """One arm.

  Attributes:
    loss_name: a key of `rome.ipa.estimators.ESTIMATORS`.
    config: its settings.
    label: what figures call it.
  """

  loss_name: str
  config: ipa.IPAConfig
  label: str

  def __post_init__(self) -> None:
    ipa.check_estimator(self.loss_name, self.config)

  def loss(
    self, logp_BxT: chex.Array, batch: ipa.ChunkBatch, totals: ipa.Totals
  ) -> tuple[chex.Array, dict[str, chex.Array]]:
    """The loss to minimise and its metrics."""
    return ipa.ESTIMATORS[self.loss_name](logp_BxT, batch, self.config, totals)

  def returns(
    self, rollout: policy.Rollout, group_ids_B: chex.Array, step: chex.Numeric
  ) -> tuple[chex.Array, chex.Array]:
    """Returns or advantages [B, H] of all chunks, and which episodes are positive [B].

    GiGPO's anchor state is the step: the episodes of a group play one instance and end at the first
    wrong word, so all that reach a step are in the same state there.
    """
    num_chunks_B = rollout.played.sum(axis=1)
    index_1xH = jnp.arange(rollout.played.shape[1])[None]
    last_BxH = index_1xH == num_chunks_B[:, None] - 1
    rewards_BxH = jnp.where(last_BxH & rollout.success[:, None], 1.0, 0.0)
    if self.loss_name == "gigpo":
      states_BxH = jnp.broadcast_to(index_1xH, rewards_BxH.shape)
      values_BxH = ipa.gigpo_advantages(
        rewards_BxH, num_chunks_B, group_ids_B, states_BxH, self.config.gamma
      )
      return values_BxH, rollout.success
    return ipa.shaped_returns(rewards_BxH, num_chunks_B, step, self.config, group_ids_B)


def _arms() -> dict[str, Estimator]:
  grouped = ipa.IPAConfig(gamma=1.0, centre="group", scale="group")
  arms = {
    "grpo": Estimator("grpo", grouped, "GRPO"),
    "gspo": Estimator("gspo", grouped, "GSPO"),
    "gigpo": Estimator("gigpo", ipa.IPAConfig(), "GiGPO"),
  }
  for suffix, failure, what in (("", 0.0, "positives only"), ("_neg", -1.0, "failures -1")):
    chunk = ipa.IPAConfig(mask_upper=MASK_UPPER, failure_reward=failure)
    token = dataclasses.replace(chunk, gamma=1.0)
    sequence = dataclasses.replace(token, mask_upper=float("inf"))
    arms |= {
      f"ipa{suffix}": Estimator("ipa", chunk, f"chunk: IPA (Eq. 9), {what}"),
      f"token{suffix}": Estimator("topr", token, f"token mask (Eq. 6), {what}"),
      f"sequence{suffix}": Estimator("topr", sequence, f"sequence (Eq. 5), {what}"),
    }
  return arms


ESTIMATORS = _arms()
