"""Sampling and scoring are one function.

The engine draws from `distribution`, the loss scores with it: by `token_logps` where the logits are
at hand, else by `rome.models.logprob_head`, which never holds them all.

Left out for now: min-p, logit bias.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How logits become the sampled distribution.

  Attributes:
    temperature: divides the logits; > 0.
    top_k: keep the k most probable tokens (ties at the boundary stay); 0 keeps all.
    top_p: keep the smallest set of most probable tokens that holds this mass, after top-k; 1 keeps
      all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self) -> None:
    if not 0 < self.temperature < float("inf"):
      raise ValueError(f"sampling.temperature must be a positive number, got {self.temperature}")
    if self.top_k < 0:
      raise ValueError(f"sampling.top_k must be >= 0 (0 keeps every token), got {self.top_k}")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"sampling.top_p must be in (0, 1], got {self.top_p}")

  @property
  def filters(self) -> bool:
    """Whether some token may be excluded."""
    return self.top_k > 0 or self.top_p < 1


def least_kept(logits: chex.Array, sampling: Sampling) -> chex.Array:
  """The smallest logit that top-k and top-p keep.

  Args:
    logits: [..., V] float32, already divided by the temperature.
    sampling: static settings.
  Returns:
    [..., 1] float32; -inf where every token stays.
  """
  least = jnp.full((*logits.shape[:-1], 1), -jnp.inf, logits.dtype)
  if sampling.top_k:
    least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][..., -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.top_p < 1:
    sorted_logits = jnp.sort(logits, axis=-1, descending=True)
    sorted_probs = jax.nn.softmax(sorted_logits, axis=-1)
    # A token stays while the mass in front of it is below top_p, so the most probable one always
    # stays. The threshold is a logit: probabilities of the two orders differ in their last bits.
    kept = jnp.cumsum(sorted_probs, axis=-1) - sorted_probs < sampling.top_p
    nucleus = jnp.min(jnp.where(kept, sorted_logits, jnp.inf), axis=-1, keepdims=True)
    least = jnp.maximum(least, nucleus)
  return least


def distribution(logits: chex.Array, sampling: Sampling) -> chex.Array:
  """Log-probabilities of the sampled distribution; -inf where top-k or top-p excludes a token.

  Args:
    logits: [..., V] float32.
    sampling: static settings.
  Returns:
    [..., V] float32, normalised over the last axis.
  """
  logits = logits / sampling.temperature
  if sampling.filters:
    logits = jnp.where(logits < least_kept(logits, sampling), -jnp.inf, logits)
  return jax.nn.log_softmax(logits, axis=-1)


def token_logps(
  logits_BxTxV: chex.Array, tokens_BxT: chex.Array, sampling: Sampling
) -> tuple[chex.Array, chex.Array]:
  """Log-prob and entropy of each token given the tokens in front of it.

  Args:
    logits_BxTxV: [B, T, V] float32, `forward`'s: place t predicts token t + 1.
    tokens_BxT: [B, T] int32.
    sampling: the settings that the tokens were sampled under.
  Returns:
    logp [B, T] float32 nats and entropy [B, T] float32 nats, aligned with `tokens_BxT`; 0 at t = 0,
    which nothing predicts. Both carry gradients.
  """
  chex.assert_rank([logits_BxTxV, tokens_BxT], [3, 2])
  logp_BxTxV = distribution(logits_BxTxV[:, :-1], sampling)
  logp = jnp.take_along_axis(logp_BxTxV, tokens_BxT[:, 1:, None], axis=-1)[..., 0]
  # 0 log 0 = 0, in the gradient too.
  entropy = -jnp.sum(jnp.exp(logp_BxTxV) * jnp.where(logp_BxTxV > -jnp.inf, logp_BxTxV, 0), axis=-1)
  first = ((0, 0), (1, 0))
  return jnp.pad(logp, first), jnp.pad(entropy, first)
