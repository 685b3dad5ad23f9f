"""Exact numerics: the log-probs of a rollout and of training are the same bits.

Bits of a matrix product depend on its shape and on what the compiler fused with it. So generation
and scoring run one program of one shape here: `tile_hidden` extends S rows by a tile of TILE tokens
against caches of one length, `place_logits` and `place_logps` look at one place of each row. To
sample the next token the tile of a row's newest tokens is computed again, its unknown end filled
with padding, until it is full: TILE times the work of a decode. Training goes through the tiles of
whole rows in a `lax.scan` (`exact_logps`).

That it holds rests on three things. Masked places add an exact 0, so what padding and old entries
of a cache hold does not matter. Every place of every row of a product is summed in the same order,
so neither neighbours nor the slot matter; this is a property of the compiler's kernels and is what
the tests measure. And barriers keep what surrounds the pieces out of them, with
`xla_allow_excess_precision` off (`COMPILER_OPTIONS`, for the outermost `jax.jit`), so that bfloat16
is rounded wherever the program says so. Barriers are needed where one side wants more than the
other: the router's statistics, which only training wants, changed what was fused with the router
itself until they stood behind one (`rome.models.router`), on CPUs and in large shapes alone.

So the equality is a measured property of a compiler, not a proof, and a run checks it: an update
under exact numerics that sees any gap stops the run.

The backward pass is written by hand: a scan would keep the whole cache for each tile, where the
final cache serves them all, since a tile sees no place behind itself. It cannot change the bits of
the forward pass, which is the same code in and out of a gradient.

Left out: meshes and packed rows, which change shapes; experts other than `dense`, whose bits depend
on neighbours; accelerators have not been measured.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rome.models import router, sharding
from rome.models.config import ROW_COMPUTE, Compute, ModelConfig
from rome.models.decoder import Cache, extend_hidden, init_cache, logits_of
from rome.models.layout import is_stacked
from rome.models.logprobs import Sampling, SamplingRows, distribution_rows

TILE = 16  # tokens; also a page of the engine
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}

_isolated = jax.lax.optimization_barrier


def tile_hidden(
  config: ModelConfig,
  compute: Compute,
  params: chex.ArrayTree,
  cache: Cache,
  tokens_SxT: chex.Array,
  counts_S: chex.Array,
) -> tuple[chex.Array, Cache, router.Stats]:
  """Computes one tile of each row.

  Args:
    config: the model's sizes.
    compute: static; experts must be `dense`.
    params: as `init_params` gives, stacked or not.
    cache: rows of a multiple of TILE places; `length` is where each row's tile begins, also a
      multiple of TILE. Places behind it may hold anything finite.
    tokens_SxT: [S, TILE] int32, the tile's tokens, left-aligned.
    counts_S: [S] int32 in 0..TILE, how many of them are real.
  Returns:
    What the output head reads at each place, [S, TILE, D], garbage for padding; the cache with the
    tile's keys and values; the router's statistics as `hidden_states` returns them.
  Raises:
    ValueError: a mesh is in use.
  """
  chex.assert_shape(tokens_SxT, (None, TILE))
  chex.assert_is_divisible(cache.k[0].shape[-3], TILE)
  chex.assert_equal(compute.experts, "dense")
  if sharding.in_use():
    raise ValueError("exact numerics exclude a mesh: they fix the shapes of one device")
  params, cache, tokens, counts = _isolated((params, cache, tokens_SxT, counts_S))
  return _isolated(extend_hidden(config, params, cache, tokens, counts, compute))


def place_logits(config: ModelConfig, params: chex.ArrayTree, hidden_SxD: chex.Array) -> chex.Array:
  """Logits [S, V] float32 of one place of each row, [S, D] of `tile_hidden`."""
  chex.assert_rank(hidden_SxD, 2)
  return _isolated(logits_of(config, *_isolated((params, hidden_SxD))))


def place_logps(logits_SxV: chex.Array, sampling: SamplingRows) -> chex.Array:
  """The sampled distribution [S, V] of `place_logits`, as log-probs: `distribution_rows`."""
  return _isolated(distribution_rows(*_isolated((logits_SxV, sampling))))


class _Tile(NamedTuple):
  """One tile of each row: [S, TILE] int32 tokens and those that follow each, [S] start, count."""

  tokens: chex.Array
  targets: chex.Array
  start: chex.Array
  counts: chex.Array


class _Static(NamedTuple):
  config: ModelConfig
  compute: Compute
  sampling: Sampling


def exact_logps(
  config: ModelConfig,
  sampling: Sampling,
  params: chex.ArrayTree,
  tokens_SxL: chex.Array,
  lengths_S: chex.Array,
  compute: Compute = ROW_COMPUTE,
) -> tuple[chex.Array, chex.Array, router.Stats]:
  """Log-prob and entropy of each token given those in front of it, as the exact engine has them.

  Equal bit for bit to an engine's of S slots and L places a row, in a program compiled with
  `COMPILER_OPTIONS`. Differentiable once, in reverse, with respect to `params`.

  Args:
    config: the model's sizes.
    sampling: static, the settings that the tokens were sampled under.
    params: as `init_params` gives, stacked or not.
    tokens_SxL: [S, L] int32, a trajectory a row, left-aligned; L a multiple of TILE.
    lengths_S: [S] int32, how many tokens of each row are real.
    compute: static; experts must be `dense`.
  Returns:
    logp [S, L] float32 nats and entropy [S, L] float32 nats, aligned with `tokens_SxL`; 0 at the
    first place, garbage from `lengths_S` on. logp is -inf where a filter excludes the token. And
    the router's statistics as `hidden_states` returns them.
  Raises:
    ValueError: a mesh is in use.
  """
  chex.assert_rank([tokens_SxL, lengths_S], [2, 1])
  chex.assert_equal_shape_prefix([tokens_SxL, lengths_S], 1)
  chex.assert_is_divisible(tokens_SxL.shape[1], TILE)
  static = _Static(config, compute, sampling)
  (logp, entropy), stats = _score(static, params, tokens_SxL, lengths_S)

  def row(x_NxTxS: chex.Array) -> chex.Array:
    x_LxS = x_NxTxS.reshape(tokens_SxL.shape[::-1])
    return jnp.pad(x_LxS.T[:, :-1], ((0, 0), (1, 0)))

  return row(logp), row(entropy), stats


def _tiles(tokens_SxL: chex.Array, lengths_S: chex.Array) -> _Tile:
  """All tiles, [L / TILE, S, ...]."""
  s, length = tokens_SxL.shape

  def cut(x_SxL: chex.Array) -> chex.Array:
    return x_SxL.reshape(s, -1, TILE).swapaxes(0, 1)

  start = jnp.arange(0, length, TILE, dtype=jnp.int32)
  start = jnp.broadcast_to(start[:, None], (len(start), s))
  return _Tile(
    tokens=cut(tokens_SxL),
    targets=cut(jnp.roll(tokens_SxL, -1, axis=1)),
    start=start,
    counts=jnp.clip(lengths_S[None] - start, 0, TILE),
  )


def _run_tile(
  static: _Static, params: chex.ArrayTree, kv: tuple, tile: _Tile
) -> tuple[tuple, tuple[chex.Array, chex.Array], router.Stats]:
  """New keys and values, log-probs and entropies [TILE, S], the router's statistics."""
  config, compute, sampling = static
  cache = Cache(k=kv[0], v=kv[1], length=tile.start)
  hidden, cache, stats = tile_hidden(config, compute, params, cache, tile.tokens, tile.counts)
  rows = _rows(sampling, len(tile.start))

  @jax.checkpoint
  def place(now: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, chex.Array]:
    hidden_SxD, target_S = now
    logp_SxV = place_logps(place_logits(config, params, hidden_SxD), rows)
    logp = jnp.take_along_axis(logp_SxV, target_S[:, None], axis=-1)[:, 0]
    # 0 log 0 = 0, in the gradient too.
    kept = jnp.where(logp_SxV > -jnp.inf, logp_SxV, 0)
    return logp, -jnp.sum(jnp.exp(logp_SxV) * kept, axis=-1)

  # Place by place, as in generation, where the head's product has one place of each row.
  scores = jax.lax.map(place, (hidden.swapaxes(0, 1), tile.targets.T))
  return (cache.k, cache.v), scores, stats


def _rows(sampling: Sampling, slots: int) -> SamplingRows:
  """The settings as the engine has them; `place_logps` hides from the compiler that they are known.

  Otherwise it would, for one, multiply by the reciprocal of the temperature.
  """
  s = sampling
  return SamplingRows(
    temperature=jnp.full(slots, s.temperature, jnp.float32),
    top_k=jnp.full(slots, s.top_k, jnp.int32),
    top_p=jnp.full(slots, s.top_p, jnp.float32),
    min_p=jnp.full(slots, s.min_p, jnp.float32),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(
  static: _Static, params: chex.ArrayTree, tokens_SxL: chex.Array, lengths_S: chex.Array
) -> tuple[tuple[chex.Array, chex.Array], router.Stats]:
  """Log-probs and entropies [L / TILE, TILE, S] of the tokens that follow; statistics."""
  return _score_forward(static, params, tokens_SxL, lengths_S)[0]


def _score_forward(
  static: _Static, params: chex.ArrayTree, tokens_SxL: chex.Array, lengths_S: chex.Array
) -> tuple[tuple, tuple]:
  s, length = tokens_SxL.shape
  cache = init_cache(static.config, s, length, is_stacked(params), static.compute.dtype)

  def step(kv: tuple, tile: _Tile) -> tuple[tuple, tuple]:
    kv, *out = _run_tile(static, params, kv, tile)
    return kv, tuple(out)

  tiles = _tiles(tokens_SxL, lengths_S)
  kv, (scores, stats) = jax.lax.scan(step, (cache.k, cache.v), tiles)
  total = {name: x.sum(axis=0) for name, x in stats.items() if name != "choices"}
  if "choices" in stats:
    total["choices"] = jnp.moveaxis(stats["choices"], 0, 2).reshape(
      stats["choices"].shape[1], s, length, -1
    )
  return (scores, total), (params, kv, tiles)


def _score_backward(static: _Static, kept: tuple, cotangents: tuple) -> tuple:
  """From the last tile to the first, each computed again with the final cache.

  The cotangent of the keys and values gathers what later tiles ask of a place until the tile that
  wrote it takes it up.
  """
  params, kv, tiles = kept
  dscores, dstats = cotangents
  dstats = {name: x for name, x in dstats.items() if name != "choices"}
  # In float32, as many tiles add to one place.
  kv = jax.tree.map(lambda x: x.astype(jnp.float32), kv)

  def step(carry: tuple, now: tuple) -> tuple[tuple, None]:
    dparams, dkv = carry
    tile, dscores = now

    def run(params: chex.ArrayTree, kv: tuple) -> tuple:
      kv, scores, stats = _run_tile(static, params, kv, tile)
      return kv, scores, {name: stats[name] for name in dstats}

    _, back = jax.vjp(run, params, kv)
    more, dkv = back((dkv, dscores, dstats))
    return (jax.tree.map(jnp.add, dparams, more), dkv), None

  start = jax.tree.map(jnp.zeros_like, (params, kv))
  (dparams, _), _ = jax.lax.scan(step, start, (tiles, dscores), reverse=True)
  return dparams, None, None


_score.defvjp(_score_forward, _score_backward)
