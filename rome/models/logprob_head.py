"""The log-prob head: `token_logps` of hidden states, without ever holding all logits.

Logits of a batch can outweigh the model: 8,192 tokens of a vocabulary of 151,936 are 5 GB, several
times over in a backward pass. Here the vocabulary passes by in chunks. The forward pass keeps four
numbers a token (log-prob, entropy, the normaliser in two parts) and the backward pass computes each
chunk of logits again: one matrix product more, and less memory traffic.

Top-p needs whole rows sorted, so where the sampling filters, a first pass over few tokens at a time
finds each token's threshold by the function that the engine filters with.

Left out: a vocabulary split over devices keeps its meaning here but not its speed, as each chunk
is gathered; forward-mode derivatives.
"""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from rome.models import sharding
from rome.models.logprobs import Sampling, least_kept

Step = Callable[[tuple, chex.Numeric, int], tuple]

# Chunks of logits have a 32nd of their bytes, so that the few arrays of that shape which are alive
# at once stay below an eighth, and at most 256 MiB. Below 16 MiB there is nothing to save.
_SMALL = 2**24
_LARGE = 2**28
_SHARE = 32
_LANES = 128  # widths are multiples of the widest vector unit
_NARROWEST = 512  # below this the matrix products starve

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def head_logps(
  hidden_BxTxD: chex.Array,
  kernel_DxV: chex.Array,
  tokens_BxT: chex.Array,
  sampling: Sampling,
  tied: bool = False,
) -> tuple[chex.Array, chex.Array]:
  """Log-prob and entropy of each token given the tokens in front of it.

  Equal to `token_logps(hidden @ kernel, tokens, sampling)`, values and gradients, with logits in
  float32 and matrix products in the dtype of `hidden`, summed in float32. Differentiable once, in
  reverse, with respect to `hidden` and `kernel`.

  Args:
    hidden_BxTxD: [B, T, D] float32 or bfloat16, `hidden_states`': place t predicts token t + 1.
    kernel_DxV: [D, V], `head_kernel`'s.
    tokens_BxT: [B, T] int32.
    sampling: static, the settings that the tokens were sampled under.
    tied: static, the kernel is the transpose of an embedding. The same numbers; chunks are then
      cut from the embedding as it lies in memory, where a transposed copy would cost its size.
  Returns:
    logp [B, T] float32 nats and entropy [B, T] float32 nats, aligned with `tokens_BxT`; 0 at t = 0,
    which nothing predicts. logp is -inf where top-k or top-p excludes the token.
  """
  chex.assert_rank([hidden_BxTxD, kernel_DxV, tokens_BxT], [3, 2, 2])
  chex.assert_equal_shape_prefix([hidden_BxTxD, tokens_BxT], 2)
  chex.assert_equal(hidden_BxTxD.shape[-1], kernel_DxV.shape[0])
  # Every place is scored, the last one in vain: T divides better than T - 1.
  targets_BxT = jnp.roll(tokens_BxT, -1, axis=1)
  mesh = jax.sharding.get_abstract_mesh()
  devices = sharding.split_count("batch", mesh) * sharding.split_count("length", mesh)
  places = tokens_BxT.size // devices
  head = _Head(sampling, vocab=kernel_DxV.shape[1], places=places, tied=tied)
  kernel = kernel_DxV.T if tied else kernel_DxV
  b, t, d = hidden_BxTxD.shape
  # CPUs run elementwise passes slowly whose first axis is 1: half rows.
  shape = (2, t // 2) if b == 1 and t % 2 == 0 and not sharding.in_use() else (b, t)
  scores = _score(hidden_BxTxD.reshape(*shape, d), kernel, targets_BxT.reshape(shape), head)
  logp, entropy = (score.reshape(b, t) for score in scores)
  first = ((0, 0), (1, 0))
  return jnp.pad(logp[:, :-1], first), jnp.pad(entropy[:, :-1], first)


@dataclasses.dataclass(frozen=True)
class _Head:
  """What is static. The kernel is [V, D] if `tied`, else [D, V]."""

  sampling: Sampling
  vocab: int
  places: int  # of one device
  tied: bool

  @property
  def width(self) -> int:
    """How many tokens of the vocabulary a chunk has."""
    size = 4 * self.places * self.vocab
    if size <= _SMALL:
      return self.vocab
    chunks = max(_SHARE, -(-size // _LARGE))
    width = -(-self.vocab // (chunks * _LANES)) * _LANES
    return min(max(width, _NARROWEST), self.vocab)

  def logits(self, x: chex.Array, kernel: chex.Array) -> chex.Array:
    """[..., v] float32 of x [..., D] and a kernel of v tokens, divided by the temperature."""
    axes = "vd" if self.tied else "dv"
    return _einsum(f"...d,{axes}->...v", x, kernel) / self.sampling.temperature

  def chunk(
    self, x: chex.Array, kernel: chex.Array, start: chex.Numeric, size: int
  ) -> tuple[chex.Array, chex.Array]:
    """Logits [..., size] of tokens from `start` on, and their part of the kernel."""
    part = jax.lax.dynamic_slice_in_dim(kernel, start, size, axis=1 - self.tied).astype(x.dtype)
    return self.logits(x, part), part

  def over_vocabulary(self, step: Step, carry: tuple) -> tuple:
    """Runs `step(carry, start, size)` over chunks, the last one perhaps narrower."""
    full, rest = divmod(self.vocab, self.width)
    if full == 1:
      carry = step(carry, 0, self.width)
    else:
      carry = jax.lax.fori_loop(0, full, lambda i, c: step(c, i * self.width, self.width), carry)
    return step(carry, full * self.width, rest) if rest else carry


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _score(
  x_BxTxD: chex.Array, kernel: chex.Array, targets_BxT: chex.Array, head: _Head
) -> tuple[chex.Array, chex.Array]:
  """Log-prob [B, T] of each place's target, and entropy [B, T]."""
  return _score_forward(x_BxTxD, kernel, targets_BxT, head)[0]


def _score_forward(
  x_BxTxD: chex.Array, kernel: chex.Array, targets_BxT: chex.Array, head: _Head
) -> tuple[tuple[chex.Array, chex.Array], tuple]:
  cut_BxT = _cut(x_BxTxD, kernel, head) if head.sampling.filters else None

  def step(carry: tuple, start: chex.Numeric, size: int) -> tuple:
    largest, total, moment, target = carry
    logits, _ = head.chunk(x_BxTxD, kernel, start, size)
    # Of excluded tokens too: any bound serves, and this one is finite where all are excluded.
    new_largest = jnp.maximum(largest, logits.max(-1))
    gap = logits - new_largest[..., None]
    weight = jnp.exp(gap)
    if cut_BxT is not None:
      weight = jnp.where(logits >= cut_BxT[..., None], weight, 0)
    fall = largest - new_largest
    scale = jnp.exp(fall)
    moment = scale * (moment + total * fall) + (weight * gap).sum(-1)
    total = scale * total + weight.sum(-1)
    index = targets_BxT - start
    found = jnp.take_along_axis(logits, jnp.clip(index, 0, size - 1)[..., None], axis=-1)[..., 0]
    return new_largest, total, moment, jnp.where((index >= 0) & (index < size), found, target)

  zeros = jnp.zeros(targets_BxT.shape, jnp.float32)
  # Finite, as total * fall is 0 in the first step: -inf would make it NaN.
  # A target outside the vocabulary is never found and gives NaN.
  start = (jnp.full_like(zeros, -1e30), zeros, zeros, jnp.full_like(zeros, jnp.nan))
  largest, total, moment, target = head.over_vocabulary(step, start)
  log_total = jnp.log(total)
  entropy = log_total - moment / total
  logp = (target - largest) - log_total
  if cut_BxT is not None:
    logp = jnp.where(target >= cut_BxT, logp, -jnp.inf)
  # Not largest + log_total, which would have the rounding errors of large logits.
  normaliser = largest, log_total
  return (logp, entropy), (x_BxTxD, kernel, targets_BxT, normaliser, entropy, cut_BxT)


def _score_backward(
  head: _Head, residuals: tuple, cotangents: tuple[chex.Array, chex.Array]
) -> tuple[chex.Array, chex.Array, None]:
  """d logp/d logit_v = [v = target] - p_v and d entropy/d logit_v = -p_v (log p_v + entropy)."""
  x_BxTxD, kernel, targets_BxT, (largest, log_total), entropy, cut_BxT = residuals
  d_logp, d_entropy = (c[..., None] / head.sampling.temperature for c in cotangents)

  def step(carry: tuple, start: chex.Numeric, size: int) -> tuple:
    dx_BxTxD, dkernel = carry
    logits, part = head.chunk(x_BxTxD, kernel, start, size)
    logp = logits - largest[..., None] - log_total[..., None]
    is_target = (targets_BxT - start)[..., None] == jnp.arange(size)[None, None]
    d_logits = jnp.where(is_target, d_logp, 0)
    d_logits -= jnp.exp(logp) * (d_logp + d_entropy * (logp + entropy[..., None]))
    if cut_BxT is not None:
      d_logits = jnp.where(logits >= cut_BxT[..., None], d_logits, 0)
    d_logits = d_logits.astype(x_BxTxD.dtype)
    axes = "vd" if head.tied else "dv"
    dx_BxTxD += _einsum(f"btv,{axes}->btd", d_logits, part)
    dpart = _einsum(f"btv,btd->{axes}", d_logits, x_BxTxD).astype(kernel.dtype)
    return dx_BxTxD, jax.lax.dynamic_update_slice_in_dim(dkernel, dpart, start, 1 - head.tied)

  start = (jnp.zeros(x_BxTxD.shape, jnp.float32), jnp.zeros_like(kernel))
  dx_BxTxD, dkernel = head.over_vocabulary(step, start)
  return dx_BxTxD.astype(x_BxTxD.dtype), dkernel, None


_score.defvjp(_score_forward, _score_backward)


def _cut(x_BxTxD: chex.Array, kernel: chex.Array, head: _Head) -> chex.Array:
  """Thresholds [B, T]: tokens with logits from here up stay.

  Halfway between the least kept and the greatest excluded logit, as logits computed again in
  chunks of another shape differ in their last bits. A few places of every row at a time, so that
  rows stay where a mesh has them.
  """
  kernel = kernel.astype(x_BxTxD.dtype)

  def cut(x_BxD: chex.Array) -> chex.Array:
    logits = head.logits(x_BxD, kernel)
    least = least_kept(logits, head.sampling)
    excluded = jnp.max(jnp.where(logits < least, logits, -jnp.inf), axis=-1)
    return (least[..., 0] + excluded) / 2

  places = max(1, x_BxTxD.shape[1] * head.width // head.vocab)
  return jax.lax.map(cut, jnp.moveaxis(x_BxTxD, 1, 0), batch_size=places).T
