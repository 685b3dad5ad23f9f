"""One model, two ways to run it: whole rows and a growing cache; causal, packed, independent."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome import models

CONFIG = models.PRESETS["micro"]
LENGTHS = np.array([11, 6, 9])


init = jax.jit(models.init_params, static_argnums=0)


@functools.cache
def params_of(config):
  return init(config, jax.random.key(0))


def draw_tokens(rows, length, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (rows, length)).astype(np.int32)


def rows_of(lengths, width=None):
  """Segment ids and positions of one sequence a row, padded on the right."""
  place = np.arange(width or max(lengths))[None]
  real = place < np.asarray(lengths)[:, None]
  return real.astype(np.int32), np.where(real, place, 0).astype(np.int32)


forward = jax.jit(models.forward, static_argnums=(0, 5))
extend = jax.jit(models.extend, static_argnums=0)


def feed(config, params, tokens, lengths, tile):
  """Logits [B, T, V] where a tile of `tile` tokens ends, NaN elsewhere."""
  rows = len(tokens)
  cache = models.init_cache(config, rows, max(lengths))  # the longest row fills its last place
  found = np.full((rows, tokens.shape[1], config.vocab_size), np.nan, np.float32)
  for first in range(0, tokens.shape[1], tile):
    part = np.zeros((rows, tile), np.int32)
    part[:, : tokens[:, first : first + tile].shape[1]] = tokens[:, first : first + tile]
    counts = np.clip(lengths - first, 0, tile).astype(np.int32)
    logits, cache, _ = extend(config, params, cache, part, counts)
    for row in np.flatnonzero(counts):
      found[row, first + counts[row] - 1] = logits[row]
  np.testing.assert_array_equal(cache.length, lengths)
  return found


@pytest.mark.slow
@pytest.mark.parametrize(("tile", "impl"), [(1, "padded"), (5, "dense")])
def test_the_cache_says_what_whole_rows_say(tile, impl):
  params, tokens = params_of(CONFIG), draw_tokens(3, 11)
  compute = models.Compute(experts=impl)
  whole = np.asarray(forward(CONFIG, params, tokens, *rows_of(LENGTHS), compute))
  stepped = feed(CONFIG, params, tokens, LENGTHS, tile)
  at = ~np.isnan(stepped)
  assert at[..., 0].sum() == sum(-(-n // tile) for n in LENGTHS)
  np.testing.assert_allclose(stepped[at], whole[at], atol=1e-5)


@pytest.mark.slow
def test_a_row_with_count_zero_keeps_its_cache():
  params, tokens = params_of(CONFIG), draw_tokens(2, 4)
  _, before, _ = extend(CONFIG, params, models.init_cache(CONFIG, 2, 8), tokens, np.array([4, 4]))
  _, after, _ = extend(CONFIG, params, before, tokens, np.array([0, 4]))
  assert after.length.tolist() == [4, 8]
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    np.testing.assert_array_equal(a[0], b[0])
    assert (np.asarray(a[1]) != np.asarray(b[1])).any()


@pytest.mark.slow
def test_a_row_that_starts_again_forgets():
  """Setting a row's length to 0 is enough: what the places still hold is never read."""
  params, tokens = params_of(CONFIG), draw_tokens(2, 6)
  fresh, _, _ = extend(CONFIG, params, models.init_cache(CONFIG, 2, 8), tokens, np.array([6, 3]))
  used = extend(CONFIG, params, models.init_cache(CONFIG, 2, 8), tokens[::-1], np.array([6, 6]))[1]
  used = used.replace(length=used.length * 0)
  again, _, _ = extend(CONFIG, params, used, tokens, np.array([6, 3]))
  np.testing.assert_array_equal(fresh, again)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["micro", "tiny"])
def test_a_row_of_the_cache_never_sees_its_neighbours(preset):
  """Bit for bit: other tokens, other counts and other caches around it change nothing."""
  config, rows, row = models.PRESETS[preset], 6, 2
  params = params_of(config)
  rng = np.random.default_rng(5)
  seen = set()
  for trial in range(6):
    cache = models.init_cache(config, rows, 24)
    bits = b""
    for round_ in range(3):
      tokens = rng.integers(0, 264, (rows, 5)).astype(np.int32)
      counts = rng.integers(0, 6, rows).astype(np.int32)
      tokens[row], counts[row] = draw_tokens(1, 5, seed=round_)[0], 5 - round_
      if trial == 0:
        counts[np.arange(rows) != row] = 0
      logits, cache, _ = extend(config, params, cache, tokens, counts)
      bits += np.asarray(logits[row]).tobytes()
    seen.add(bits + b"".join(np.asarray(x[row]).tobytes() for x in jax.tree.leaves(cache)))
  assert len(seen) == 1


@pytest.mark.slow
def test_no_gradient_reaches_back_from_the_past_or_across_segments():
  """d logits[t] / d embedding of token j is zero iff j is later than t or of another segment."""
  config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
  params = params_of(config)
  tokens = np.arange(10, 18, dtype=np.int32)[None]  # all different: a row of the table is a place
  segments = np.array([[1, 1, 1, 2, 2, 2, 0, 0]], np.int32)
  positions = np.array([[0, 1, 2, 0, 1, 2, 0, 1]], np.int32)
  direction = np.random.default_rng(0).normal(size=config.vocab_size).astype(np.float32)

  def projected(table):
    changed = params | {"embed_tokens": {"embedding": table}}
    return forward(config, changed, tokens, segments, positions)[0] @ direction

  jacobian = jax.jacrev(projected)(params["embed_tokens"]["embedding"])
  reaches = np.abs(jacobian[:, tokens[0]]).max(axis=-1) > 0
  same = segments[0][:, None] == segments[0][None]
  np.testing.assert_array_equal(reaches, same & np.tril(np.ones((8, 8), bool)))


@pytest.mark.slow
def test_packed_rows_are_separate_rows():
  params, tokens = params_of(CONFIG), draw_tokens(3, 11)
  alone = np.asarray(forward(CONFIG, params, tokens, *rows_of(LENGTHS)))
  packed = np.concatenate([tokens[b, :n] for b, n in enumerate(LENGTHS)])[None]
  segments = np.repeat(np.arange(1, 4, dtype=np.int32), LENGTHS)[None]
  positions = np.concatenate([np.arange(n, dtype=np.int32) for n in LENGTHS])[None]
  together = np.asarray(forward(CONFIG, params, packed, segments, positions))
  want = np.concatenate([alone[b, :n] for b, n in enumerate(LENGTHS)])
  np.testing.assert_allclose(together[0], want, atol=1e-5)


@pytest.mark.slow
def test_padding_changes_nothing():
  params, tokens = params_of(CONFIG), draw_tokens(3, 11)
  narrow = np.asarray(forward(CONFIG, params, tokens, *rows_of(LENGTHS)))
  padded = np.concatenate([tokens, draw_tokens(3, 6, seed=9)], axis=1)
  wide = np.asarray(forward(CONFIG, params, padded, *rows_of(LENGTHS, 17)))
  assert np.isfinite(wide).all()
  for b, n in enumerate(LENGTHS):
    np.testing.assert_allclose(wide[b, :n], narrow[b, :n], atol=1e-5)


def test_order_matters_and_position_is_relative():
  params, tokens = params_of(CONFIG), draw_tokens(3, 11)
  segments, positions = rows_of([11] * 3)
  logits = np.asarray(forward(CONFIG, params, tokens, segments, positions))
  shifted = np.asarray(forward(CONFIG, params, tokens, segments, positions + 50))
  np.testing.assert_allclose(logits, shifted, atol=1e-4)
  swapped = tokens[:, [1, 0, *range(2, 11)]]
  other = np.asarray(forward(CONFIG, params, swapped, segments, positions))
  assert np.abs(other[:, 10] - logits[:, 10]).max() > 1e-3


@pytest.mark.slow
def test_parameters_follow_from_the_key_alone():
  first, again, other = (jax.tree.leaves(init(CONFIG, jax.random.key(seed))) for seed in (1, 1, 2))
  for a, b in zip(first, again, strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_array_equal(a, b)
  assert sum((a != c).any() for a, c in zip(first, other, strict=True)) > len(first) / 2
