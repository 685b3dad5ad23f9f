"""Sampling and scoring are one function.

The engine draws from `distribution`, the loss scores with it: by `token_logps` where the logits are
at hand, else by `rome.models.logprob_head`, which never holds them all.

A draw takes one uniform number and inverts the distribution function: noise for each token of a
vocabulary (Gumbel-max) costs more than the forward pass of a small model on a CPU.
"""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
from flax import struct

_BLOCK = 128  # tokens whose mass is summed first, in `draw`


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How logits become the sampled distribution.

  Attributes:
    temperature: divides the logits; > 0.
    top_k: keep the k most probable tokens (ties at the boundary stay); 0 keeps all.
    top_p: keep the smallest set of most probable tokens that holds this mass, after top-k; 1 keeps
      all.
    min_p: keep tokens at least this many times as probable as the most probable one; 0 keeps all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0

  def __post_init__(self) -> None:
    if not 0 < self.temperature < float("inf"):
      raise ValueError(f"sampling.temperature must be a positive number, got {self.temperature}")
    if self.top_k < 0:
      raise ValueError(f"sampling.top_k must be >= 0 (0 keeps every token), got {self.top_k}")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"sampling.top_p must be in (0, 1], got {self.top_p}")
    if not 0 <= self.min_p <= 1:
      raise ValueError(f"sampling.min_p must be in [0, 1], got {self.min_p}")

  @property
  def filters(self) -> bool:
    """Whether some token may be excluded."""
    return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@struct.dataclass
class SamplingRows:
  """A `Sampling` for each row of a batch, as arrays.

  Attributes:
    temperature, top_p, min_p: [B] float32.
    top_k: [B] int32.
  """

  temperature: chex.Array
  top_k: chex.Array
  top_p: chex.Array
  min_p: chex.Array


def _least_kept(
  logits: chex.Array, top_k: chex.Numeric, top_p: chex.Numeric, min_p: chex.Numeric
) -> chex.Array:
  """The smallest logit that the filters keep: [..., 1]; each filter is a number or [..., 1]."""
  vocab = logits.shape[-1]
  sorted_logits = jnp.sort(logits, axis=-1, descending=True)
  last = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab) - 1
  last = jnp.broadcast_to(last, (*logits.shape[:-1], 1)).astype(jnp.int32)
  least = jnp.take_along_axis(sorted_logits, last, axis=-1)
  sorted_logits = jnp.where(sorted_logits < least, -jnp.inf, sorted_logits)
  sorted_probs = jax.nn.softmax(sorted_logits, axis=-1)
  # A token stays while the mass in front of it is below top_p, and the most probable one always.
  # The threshold is a logit: probabilities of the two orders differ in their last bits.
  before = jnp.cumsum(sorted_probs, axis=-1) - sorted_probs
  kept = (before < top_p) | (before <= 0) | (top_p >= 1)
  nucleus = jnp.min(jnp.where(kept, sorted_logits, jnp.inf), axis=-1, keepdims=True)
  relative = sorted_logits[..., :1] + jnp.log(jnp.float32(min_p))
  return jnp.maximum(jnp.maximum(least, nucleus), relative)


def least_kept(logits: chex.Array, sampling: Sampling) -> chex.Array:
  """The smallest logit that top-k, top-p and min-p keep.

  Args:
    logits: [..., V] float32, already divided by the temperature.
    sampling: static settings.
  Returns:
    [..., 1] float32; -inf where every token stays.
  """
  if not sampling.filters:
    return jnp.full((*logits.shape[:-1], 1), -jnp.inf, logits.dtype)
  return _least_kept(logits, sampling.top_k, sampling.top_p, sampling.min_p)


def distribution(logits: chex.Array, sampling: Sampling) -> chex.Array:
  """Log-probabilities of the sampled distribution; -inf where a filter excludes a token.

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


def distribution_rows(logits_BxV: chex.Array, sampling: SamplingRows) -> chex.Array:
  """`distribution`, with settings of its own for each row.

  Args:
    logits_BxV: [B, V] float32.
    sampling: the rows' settings.
  Returns:
    [B, V] float32, normalised over the last axis.
  """
  chex.assert_rank(logits_BxV, 2)
  temperature, top_k, top_p, min_p = (
    x[:, None] for x in (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
  )
  logits = logits_BxV / temperature

  def filtered(logits: chex.Array) -> chex.Array:
    return jnp.where(logits < _least_kept(logits, top_k, top_p, min_p), -jnp.inf, logits)

  some = jnp.any((top_k > 0) | (top_p < 1) | (min_p > 0))  # else nobody pays for the sort
  logits = jax.lax.cond(some, filtered, lambda logits: logits, logits)
  return jax.nn.log_softmax(logits, axis=-1)


def draw(logp_BxV: chex.Array, uniform_B: chex.Array) -> chex.Array:
  """One token a row, by inversion of the distribution function.

  Args:
    logp_BxV: [B, V] float32 log-probs, as `distribution` gives.
    uniform_B: [B] float32 in [0, 1).
  Returns:
    [B] int32; never a token of probability 0. The chance of a token is its probability up to the
    2**-23 steps of the uniform number.
  """
  chex.assert_rank([logp_BxV, uniform_B], [2, 1])
  b, vocab = logp_BxV.shape
  blocks = math.ceil(vocab / _BLOCK)
  p = jnp.pad(jnp.exp(logp_BxV), ((0, 0), (0, blocks * _BLOCK - vocab)))
  p_BxMxW = p.reshape(b, blocks, _BLOCK)
  upto_BxM = jnp.cumsum(p_BxMxW.sum(axis=-1), axis=-1)
  block, before = _invert(upto_BxM, uniform_B * upto_BxM[:, -1])
  inside_BxW = jnp.take_along_axis(p_BxMxW, block[:, None, None], axis=1)[:, 0]
  upto_BxW = jnp.cumsum(inside_BxW, axis=-1)
  token, _ = _invert(upto_BxW, uniform_B * upto_BxM[:, -1] - before)
  return block * _BLOCK + token


def _invert(upto_BxN: chex.Array, target_B: chex.Array) -> tuple[chex.Array, chex.Array]:
  """The first place [B] whose cumulative mass exceeds the target, and the mass in front of it.

  Where rounding has put the target at the end or beyond it, the last place that has mass.
  """
  before_BxN = jnp.pad(upto_BxN[:, :-1], ((0, 0), (1, 0)))
  places = jnp.arange(upto_BxN.shape[1])[None]
  last = jnp.max(jnp.where(upto_BxN > before_BxN, places, 0), axis=-1)
  place = jnp.minimum(jnp.sum(upto_BxN <= target_B[:, None], axis=-1), last).astype(jnp.int32)
  return place, jnp.take_along_axis(before_BxN, place[:, None], axis=-1)[:, 0]


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
