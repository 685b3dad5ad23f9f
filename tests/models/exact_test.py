"""Generation and training agree bit for bit, and the test that says so can fail."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome import models
from rome.models import exact
from rome.models.logprobs import SamplingRows

SLOTS, LENGTH = 4, 64
MOE = models.PRESETS["micro"]
DENSE = dataclasses.replace(
  MOE, num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, intermediate_size=48,
  tie_word_embeddings=False,
)  # fmt: skip
SAMPLING = models.Sampling(temperature=0.8, top_p=0.9)


@functools.cache
@functools.partial(jax.jit, static_argnums=(0, 1))
def params_of(config, stacked=False):
  """Weights far enough from their first values that log-probs use all their bits."""
  params = models.init_params(config, jax.random.key(0))
  keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
  params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)
  return models.stack_layers(config, params) if stacked else params


def forced(seed=0):
  """[S, L]: a prompt, and text of a tool in the middle of a tile; -1 where a token is sampled."""
  rng = np.random.default_rng(seed)
  tokens = np.full((SLOTS, LENGTH), -1, np.int32)
  for row in tokens:
    for first, count in ((0, rng.integers(3, 19)), (rng.integers(24, 40), 7)):
      row[first : first + count] = rng.integers(0, 256, count)
  return tokens


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=exact.COMPILER_OPTIONS)
def rollout(config, compute, params, known_SxL, delay_S, rows):
  """Tokens and log-probs [S, L]: a token a step, row s beginning after delay_S[s] steps."""
  cache = models.init_cache(config, SLOTS, LENGTH, models.is_stacked(params), compute.dtype)
  slots = jnp.arange(SLOTS)

  def step(carry):
    i, cache, tail, logp, tokens, logps = carry
    place = i - delay_S
    active = (place >= 0) & (place < LENGTH)
    place = jnp.clip(place, 0, LENGTH - 1)
    uniform = jax.random.uniform(jax.random.fold_in(jax.random.key(2), i), (SLOTS,))
    known = known_SxL[slots, place]
    token = jnp.where(known >= 0, known, models.draw(logp, uniform))
    at = slots, jnp.where(active, place, LENGTH)
    tokens = tokens.at[at].set(token, mode="drop")
    logps = logps.at[at].set(logp[slots, token], mode="drop")
    inside = place % exact.TILE
    tail = tail.at[slots, jnp.where(active, inside, exact.TILE)].set(token, mode="drop")
    counts = jnp.where(active, inside + 1, 0)
    cache = dataclasses.replace(cache, length=place - inside)
    hidden, cache, _ = exact.tile_hidden(config, compute, params, cache, tail, counts)
    logits = exact.place_logits(config, params, hidden[slots, inside])
    return i + 1, cache, tail, exact.place_logps(logits, rows), tokens, logps

  start = (
    0, cache, jnp.full((SLOTS, exact.TILE), 7), jnp.zeros((SLOTS, config.vocab_size)),
    jnp.zeros((SLOTS, LENGTH), jnp.int32), jnp.zeros((SLOTS, LENGTH)),
  )  # fmt: skip
  carry = jax.lax.while_loop(lambda c: c[0] < LENGTH + delay_S.max(), step, start)
  return carry[-2:]


@functools.partial(jax.jit, static_argnums=(0, 1))
def ordinary_rollout(config, compute, params, tokens_SxL, rows):
  """Log-probs [S, L] of given tokens, decoded one by one."""
  cache = models.init_cache(config, SLOTS, LENGTH, models.is_stacked(params), compute.dtype)

  def step(carry, token_S):
    cache, logp = carry
    one = jnp.ones(SLOTS, jnp.int32)
    logits, cache, _ = models.extend(config, params, cache, token_S[:, None], one, compute)
    return (cache, models.distribution_rows(logits, rows)), logp[jnp.arange(SLOTS), token_S]

  start = cache, jnp.zeros((SLOTS, config.vocab_size))
  return jax.lax.scan(step, start, tokens_SxL.T)[1].T


def rows_of(sampling):
  values = dataclasses.asdict(sampling)
  return SamplingRows(**{name: jnp.full(SLOTS, value) for name, value in values.items()})


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=exact.COMPILER_OPTIONS)
def train(config, compute, sampling, params, tokens, lengths, weights):
  """Value and gradient of a weighted sum; the log-probs, entropies and statistics."""

  def loss(params):
    logp, entropy, stats = exact.exact_logps(config, sampling, params, tokens, lengths, compute)
    total = jnp.where(weights != 0, weights * logp + 0.1 * entropy, 0).sum()
    if stats:
      total += 0.01 * stats["z"].sum() + 0.02 * (stats["prob"] ** 2).sum()
    return total, (logp, entropy, stats)

  return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train_ordinary(config, compute, sampling, params, tokens, lengths, weights):
  """The same by the ordinary functions."""
  places = jnp.broadcast_to(jnp.arange(LENGTH)[None], tokens.shape)
  segments = (places < lengths[:, None]).astype(jnp.int32)

  def loss(params):
    hidden, stats = models.hidden_states(config, params, tokens, segments, places, compute)
    head, tied = models.head_kernel(config, params), config.tie_word_embeddings
    logp, entropy = models.head_logps(hidden, head, tokens, sampling, tied)
    total = jnp.where(weights != 0, weights * logp + 0.1 * entropy, 0).sum()
    if stats:
      total += 0.01 * stats["z"].sum() + 0.02 * (stats["prob"] ** 2).sum()
    return total, (logp, entropy, stats)

  return jax.value_and_grad(loss, has_aux=True)(params)


FULL = np.full(SLOTS, LENGTH, np.int32)
DELAY = np.array([0, 3, 21, 16], np.int32)


@pytest.mark.slow
@pytest.mark.parametrize(
  "config, dtype, stacked", [(MOE, "bfloat16", True), (DENSE, "float32", False)]
)
def test_a_rollout_has_the_bits_of_training(config, dtype, stacked):
  params, compute = params_of(config, stacked), models.Compute(dtype, "dense")
  known, rows = forced(), rows_of(SAMPLING)
  tokens, sampled_logp = map(np.asarray, rollout(config, compute, params, known, DELAY, rows))
  np.testing.assert_array_equal(tokens[known >= 0], known[known >= 0])
  drawn = known < 0
  weights = np.where(drawn, np.random.default_rng(1).normal(size=drawn.shape), 0)
  (_, (logp, _, _)), grads = train(config, compute, SAMPLING, params, tokens, FULL, weights)
  assert drawn.sum() > 140
  np.testing.assert_array_equal(np.asarray(logp)[drawn], sampled_logp[drawn])
  assert np.isfinite(sampled_logp[drawn]).all() and sampled_logp[drawn].min() < -1
  # What a filter excludes has no log-prob, and leaves the gradient whole.
  assert not np.isfinite(logp[known >= 0][1:]).all()
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  ordinary = np.asarray(ordinary_rollout(config, compute, params, tokens, rows))
  assert (ordinary != sampled_logp)[drawn].mean() > (0.3 if dtype == "float32" else 0.0)


def test_rows_have_the_same_bits_in_any_slot_beside_any_neighbours():
  params, compute = params_of(MOE, stacked=True), models.Compute("bfloat16", "dense")
  tokens = np.random.default_rng(0).integers(0, 256, (SLOTS, LENGTH)).astype(np.int32)
  score = jax.jit(
    lambda *args: exact.exact_logps(MOE, SAMPLING, params, *args, compute)[0],
    compiler_options=exact.COMPILER_OPTIONS,
  )
  logp = score(tokens, FULL)
  others = np.roll(tokens, 1, axis=0)
  others[0], lengths = 3, np.array([5, LENGTH, LENGTH, LENGTH], np.int32)
  np.testing.assert_array_equal(score(others, lengths)[1:], logp[:-1])


def test_a_tile_depends_on_the_tokens_in_front_alone():
  """Not on padding, on old entries of the cache, or on whether the tile is full."""
  params, compute = params_of(MOE), models.Compute("float32", "dense")
  cache = models.init_cache(MOE, SLOTS, LENGTH)
  run = jax.jit(functools.partial(exact.tile_hidden, MOE, compute, params))
  tokens = np.random.default_rng(0).integers(0, 256, (SLOTS, exact.TILE)).astype(np.int32)
  full, after, _ = run(cache, tokens, np.full(SLOTS, exact.TILE))
  dirty = dataclasses.replace(
    cache, k=tuple(x + 3 for x in cache.k), v=tuple(x - 9 for x in cache.v)
  )
  part = np.where(np.arange(exact.TILE)[None] < 9, tokens, 77)
  some, partly, _ = run(dirty, part, np.full(SLOTS, 9))
  np.testing.assert_array_equal(full[:, :9], some[:, :9])
  for new, old in zip(after.k + after.v, partly.k + partly.v, strict=True):
    np.testing.assert_array_equal(new[:, :9], old[:, :9])
    np.testing.assert_array_equal(new[:, 16:], 0)


@pytest.mark.parametrize("config", [MOE, pytest.param(DENSE, marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_ordinary_scoring(config):
  params, compute = params_of(config, stacked=True), models.Compute("float32", "dense")
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 256, (SLOTS, LENGTH)).astype(np.int32)
  lengths = np.array([64, 33, 7, 48], np.int32)
  weights = np.where(np.arange(LENGTH)[None] < lengths[:, None], rng.normal(size=tokens.shape), 0)
  weights[:, 0] = 0
  args = config, compute, models.Sampling(temperature=0.7), params, tokens, lengths, weights
  (loss, (logp, entropy, stats)), grads = train(*args)
  (loss2, (logp2, entropy2, stats2)), grads2 = train_ordinary(*args)
  used = weights != 0
  np.testing.assert_allclose(loss, loss2, rtol=1e-5)
  np.testing.assert_allclose(logp[used], logp2[used], atol=2e-5)
  np.testing.assert_allclose(entropy[used], entropy2[used], atol=2e-5)
  assert stats.keys() == stats2.keys()
  real = np.arange(LENGTH)[None] < lengths[:, None]
  for name, x in stats.items():
    same = (x[:, real], stats2[name][:, real]) if name == "choices" else (x, stats2[name])
    np.testing.assert_allclose(*same, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads2), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()) + 1e-7)


@pytest.mark.slow
def test_gradients_in_bfloat16_are_as_near_the_truth_as_the_ordinary_ones():
  params, true = params_of(DENSE), models.Compute("float32", "dense")
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 256, (SLOTS, LENGTH)).astype(np.int32)
  weights = rng.normal(size=tokens.shape)
  weights[:, 0] = 0

  def flat(run, compute):
    _, grads = run(DENSE, compute, models.Sampling(), params, tokens, FULL, weights)
    return np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])

  want = flat(train_ordinary, true)
  ours, theirs = (flat(run, models.Compute("bfloat16", "dense")) for run in (train, train_ordinary))
  errors = [np.linalg.norm(got - want) / np.linalg.norm(want) for got in (ours, theirs)]
  assert errors[0] < 1.2 * errors[1] < 0.1


def test_refuses_what_it_cannot_do():
  params, tokens = params_of(MOE), np.zeros((2, 24), np.int32)
  lengths = np.full(2, 24, np.int32)
  score = functools.partial(exact.exact_logps, MOE, SAMPLING, params)
  with pytest.raises(AssertionError):  # 24 places are no whole tiles
    score(tokens, lengths)
  with pytest.raises(AssertionError):  # experts whose bits depend on neighbours
    score(tokens[:, :16], lengths, models.Compute(experts="padded"))
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="mesh"):
    score(tokens[:, :16], lengths)  # on the way of the engine too
