"""The decode program: advances every row by up to `steps` sampled tokens in one device call.

A row feeds its newest token, of the context or sampled, whose keys and values are not yet known;
the logits that come back say what follows. So a context is prefilled up to its last token, prefill
never computes logits, and a context that is known in full costs one step.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rome import models
from rome.models import exact
from rome.rollout.engine.backend import Backend
from rome.rollout.engine.prefixes import PAGE
from rome.rollout.engine.request import MAX_BIAS, MAX_STOP_TOKENS, MAX_TOP, Request

_NO_TOKEN = -1
_NOBODY = Request(context=(), max_tokens=0)


@struct.dataclass
class Settings:
  """What the requests in S rows ask for; numpy arrays that `write` fills.

  Attributes:
    sampling: of each row.
    greedy: [S] bool.
    key: [S, 2] uint32.
    stop: [S, MAX_STOP_TOKENS] int32, -1 where unused.
    bias_ids, bias: [S, MAX_BIAS] int32 and float32; unused entries add 0 to token 0.
    top: [S] int32, alternatives to record.
  """

  sampling: models.SamplingRows
  greedy: np.ndarray
  key: np.ndarray
  stop: np.ndarray
  bias_ids: np.ndarray
  bias: np.ndarray
  top: np.ndarray

  @classmethod
  def empty(cls, slots: int) -> "Settings":
    def full(value: float, dtype: type, *shape: int) -> np.ndarray:
      return np.full((slots, *shape), value, dtype)

    return cls(
      sampling=models.SamplingRows(
        temperature=full(1, np.float32),
        top_k=full(0, np.int32),
        top_p=full(1, np.float32),
        min_p=full(0, np.float32),
      ),
      greedy=full(False, bool),
      key=full(0, np.uint32, 2),
      stop=full(_NO_TOKEN, np.int32, MAX_STOP_TOKENS),
      bias_ids=full(0, np.int32, MAX_BIAS),
      bias=full(0, np.float32, MAX_BIAS),
      top=full(0, np.int32),
    )

  def clear(self, slot: int) -> None:
    """Row `slot` serves nobody."""
    self.write(slot, _NOBODY, ())

  def write(self, slot: int, request: Request, stop: tuple[int, ...]) -> None:
    """Row `slot` serves `request`, which ends on the ids `stop`."""
    for name in ("temperature", "top_p", "min_p"):
      getattr(self.sampling, name)[slot] = getattr(request.sampling, name)
    self.sampling.top_k[slot] = min(request.sampling.top_k, np.iinfo(np.int32).max)
    self.greedy[slot], self.key[slot], self.top[slot] = (
      request.greedy,
      request.key,
      request.top_logps,
    )
    self.stop[slot] = _NO_TOKEN
    self.stop[slot, : len(stop)] = stop
    self.bias_ids[slot], self.bias[slot] = 0, 0
    if request.logit_bias:
      ids, values = zip(*request.logit_bias, strict=True)
      self.bias_ids[slot, : len(ids)], self.bias[slot, : len(ids)] = ids, values


@struct.dataclass
class Decoded:
  """What a decode of I steps gave, for S rows.

  Attributes:
    tokens: [S, I] int32, -1 where a row sampled nothing.
    logps: [S, I] float32, nats.
    left: [S] int32, tokens still to sample; 0 after a stop token.
    top_ids, top_logps: [S, I, MAX_TOP], most probable first; only where a row asked for some.
  """

  tokens: Any
  logps: Any
  left: Any
  top_ids: Any
  top_logps: Any


def decode(backend: Backend, *args: Any) -> tuple[Any, Decoded]:
  """`_decode`, which says what its arguments are, compiled as the backend wants it."""
  return _program(backend.compiler_options)(backend, *args)


@functools.cache
def _program(compiler_options: tuple[tuple[str, Any], ...]) -> Callable:
  return jax.jit(
    _decode, static_argnums=(0, 1), donate_argnums=3, compiler_options=dict(compiler_options)
  )


def _decode(
  backend: Backend,
  steps: int,
  params: Any,
  pages: Any,
  table_SxM: chex.Array,
  settings: Settings,
  base_key: chex.PRNGKey,
  token_S: chex.Array,
  place_S: chex.Array,
  index_S: chex.Array,
  left_S: chex.Array,
  tail_SxT: chex.Array,
) -> tuple[Any, Decoded]:
  """Advances the rows with `left` > 0.

  Args:
    backend, steps: static.
    params, pages: the backend's.
    table_SxM: [S, M] int32, pages of each row.
    settings: of each row.
    base_key: see `Request.key`.
    token_S: [S] int32, the newest token of each row, and `place_S` [S] int32 where it lies.
    index_S: [S] int32, how many tokens of the reply there are already.
    left_S: [S] int32, how many may still be sampled; 0 leaves a row alone.
    tail_SxT: [S, PAGE] int32, tokens of each row's page that `place_S` is in.
  Returns:
    The pages and what was sampled.
  """
  chex.assert_rank([table_SxM, token_S, tail_SxT], [2, 1, 2])
  slots = len(token_S)
  fold = jax.vmap(jax.random.fold_in)
  keys_S = jax.vmap(lambda a: jax.random.fold_in(base_key, a))(settings.key[:, 0])
  keys_S = fold(keys_S, settings.key[:, 1])
  wants_top, some_greedy = jnp.any(settings.top > 0), jnp.any(settings.greedy)
  tops = min(MAX_TOP, backend.config.vocab_size)

  def best(logp_SxV: chex.Array) -> tuple[chex.Array, chex.Array]:
    values, ids = jax.lax.top_k(logp_SxV, tops)
    return ids, values

  def nothing(logp_SxV: chex.Array) -> tuple[chex.Array, chex.Array]:
    return jnp.zeros((slots, tops), jnp.int32), jnp.zeros((slots, tops))

  def body(state: tuple) -> tuple:
    i, carry, token, place, out = state
    active = out.left > 0
    logits, carry = backend.extend(params, carry, token, place, active)
    # Apart from what surrounds it, so that training can have the same bits.
    logp = exact.place_logps(_biased(logits, settings), settings.sampling)
    uniform = jax.vmap(jax.random.uniform)(fold(keys_S, index_S + i))
    drawn = models.draw(logp, uniform)
    likeliest = jax.lax.cond(some_greedy, _argmax, lambda logp: jnp.zeros_like(drawn), logp)
    new = jnp.where(active, jnp.where(settings.greedy, likeliest, drawn), _NO_TOKEN)
    stopped = jnp.any(settings.stop == new[:, None], axis=1)
    chosen = jnp.take_along_axis(logp, jnp.maximum(new, 0)[:, None], axis=1)[:, 0]
    top_ids, top_logps = jax.lax.cond(wants_top, best, nothing, logp)
    out = Decoded(
      tokens=out.tokens.at[:, i].set(new),
      logps=out.logps.at[:, i].set(chosen),
      left=jnp.where(active, jnp.where(stopped, 0, out.left - 1), out.left),
      top_ids=out.top_ids.at[:, i].set(top_ids),
      top_logps=out.top_logps.at[:, i].set(top_logps),
    )
    return i + 1, carry, jnp.maximum(new, 0), place + active, out

  out = Decoded(
    tokens=jnp.full((slots, steps), _NO_TOKEN, jnp.int32),
    logps=jnp.zeros((slots, steps)),
    left=jnp.asarray(left_S),
    top_ids=jnp.zeros((slots, steps, tops), jnp.int32),
    top_logps=jnp.zeros((slots, steps, tops)),
  )
  carry = backend.open(pages, table_SxM, place_S, tail_SxT)
  state = (0, carry, jnp.asarray(token_S), jnp.asarray(place_S), out)
  state = jax.lax.while_loop(lambda s: (s[0] < steps) & jnp.any(s[4].left > 0), body, state)
  return backend.close(state[1]), state[4]


def _argmax(logp_SxV: chex.Array) -> chex.Array:
  """As jnp.argmax, which XLA does not vectorise on CPUs: there it can cost half a forward pass."""
  ids = jnp.arange(logp_SxV.shape[1], dtype=jnp.int32)[None]
  best = jnp.max(logp_SxV, axis=-1, keepdims=True)
  return jnp.min(jnp.where(logp_SxV >= best, ids, logp_SxV.shape[1]), axis=-1)


def _biased(logits_SxV: chex.Array, settings: Settings) -> chex.Array:
  def add(logits: chex.Array) -> chex.Array:
    rows = jnp.arange(len(logits))[:, None]
    return logits.at[rows, settings.bias_ids].add(settings.bias)

  return jax.lax.cond(jnp.any(settings.bias != 0), add, lambda logits: logits, logits_SxV)


def tail(tokens: list[int], place: int) -> list[int]:
  """The tokens of the page that `place` is in, up to it, padded with 0."""
  part = tokens[place - place % PAGE : place + 1]
  return part + [0] * (PAGE - len(part))
