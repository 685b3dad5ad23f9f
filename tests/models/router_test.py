"""Router replay: recorded choices say the same again, and other choices are followed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome import models
from rome.models import router

# Layer 0 dense, 1 and 2 sparse.
CONFIG = dataclasses.replace(
  models.PRESETS["micro"], num_hidden_layers=3, mlp_only_layers=(0,), intermediate_size=24
)
LENGTHS = np.array([9, 6])
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 9)).astype(np.int32)
SEGMENTS = (np.arange(9)[None] < LENGTHS[:, None]).astype(np.int32)
POSITIONS = np.tile(np.arange(9, dtype=np.int32), (2, 1))
N, E, K = 23, 6, 2

hidden_states = jax.jit(models.hidden_states, static_argnums=(0, 5))
extend = jax.jit(models.extend, static_argnums=0)


@functools.cache
def params_of(stacked=False):
  params = jax.jit(models.init_params, static_argnums=0)(CONFIG, jax.random.key(0))
  return models.stack_layers(CONFIG, params) if stacked else params


def run(choices=None, stacked=False, impl="padded"):
  compute = models.Compute(experts=impl)
  return hidden_states(CONFIG, params_of(stacked), TOKENS, SEGMENTS, POSITIONS, compute, choices)


def oracle(logits, choices, normalise):
  """Softmax in float64 of the chosen."""
  probs = np.exp(np.asarray(logits, np.float64))
  weights = np.take_along_axis(probs / probs.sum(axis=1, keepdims=True), choices, axis=1)
  return weights / weights.sum(axis=1, keepdims=True) if normalise else weights


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.slow
def test_weights_of_any_choices(normalise):
  """The probabilities of the experts asked for, in their order, with the gradient of those."""
  rng = np.random.default_rng(1)
  logits = jnp.asarray(rng.normal(size=(N, E)), jnp.float32)
  choices = np.stack([rng.choice(E, K, replace=False) for _ in range(N)]).astype(np.int32)
  weights, experts = router.route(logits, K, normalise, jnp.asarray(choices))
  np.testing.assert_array_equal(experts, choices)
  np.testing.assert_allclose(weights, oracle(logits, choices, normalise), rtol=1e-5)

  direction = rng.normal(size=(N, K))
  gradient = jax.grad(
    lambda x: (router.route(x, K, normalise, jnp.asarray(choices))[0] * direction).sum()
  )(logits)
  for n, e in [(0, 0), (5, 2), (22, 5)]:  # central differences in float64
    nudge = np.zeros((N, E))
    nudge[n, e] = 1e-5
    exact = np.asarray(logits, np.float64)
    up, down = (oracle(exact + x, choices, normalise) for x in (nudge, -nudge))
    want = ((up - down) * direction).sum() / 2e-5
    assert float(gradient[n, e]) == pytest.approx(want, abs=1e-5)


def test_replaying_the_best_is_choosing_them():
  logits = jnp.asarray(np.random.default_rng(2).normal(size=(N, E)), jnp.float32)
  weights, experts = router.route(logits, K, True)
  again, same = router.route(logits, K, True, experts)
  np.testing.assert_array_equal(again, weights)
  np.testing.assert_array_equal(same, experts)


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_recorded_choices_say_the_same_bits(stacked):
  plain, stats = run(stacked=stacked)
  assert stats["choices"].shape == (2, 2, 9, K) and stats["choices"].dtype == jnp.int32
  said, again = run(stats["choices"], stacked)
  np.testing.assert_array_equal(again["choices"], stats["choices"])
  for name in ("load", "prob", "z"):
    np.testing.assert_allclose(again[name], stats[name], rtol=1e-6)
  assert np.asarray(said).tobytes() == np.asarray(plain).tobytes()


@pytest.mark.slow
def test_other_choices_are_followed():
  """They are recorded and counted; and it is the expert that they name who answers."""
  plain, stats = run(impl="dense")
  other = (stats["choices"] + 1) % CONFIG.num_experts
  followed, seen = run(other, impl="dense")
  np.testing.assert_array_equal(seen["choices"], other)
  assert np.abs(np.asarray(followed - plain))[SEGMENTS == 1].max() > 1e-3
  real = SEGMENTS.astype(bool)
  want = [np.bincount(np.asarray(c)[real].ravel(), minlength=CONFIG.num_experts) for c in other]
  np.testing.assert_array_equal(seen["load"], want)
  # The same experts under permuted names, with the choices renamed: nothing changes.
  renamed = jax.tree.map(lambda x: x, params_of())
  for i in (1, 2):
    mlp = renamed[f"layers_{i}"]["mlp"]
    shift = functools.partial(jnp.roll, shift=1)
    renamed[f"layers_{i}"]["mlp"] = {
      "router": shift(mlp["router"], axis=1),
      "gate_up_proj": shift(mlp["gate_up_proj"], axis=0),
      "down_proj": shift(mlp["down_proj"], axis=0),
    }
  moved, _ = hidden_states(
    CONFIG, renamed, TOKENS, SEGMENTS, POSITIONS, models.Compute(experts="dense"),
    (other + 1) % CONFIG.num_experts,
  )  # fmt: skip
  np.testing.assert_allclose(moved, followed, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_the_cache_records_what_whole_rows_record(stacked):
  _, stats = run(stacked=stacked, impl="dense")
  cache = models.init_cache(CONFIG, 2, 9, stacked=stacked)
  parts = []
  for first in range(0, 9, 3):
    counts = np.clip(LENGTHS - first, 0, 3).astype(np.int32)
    tokens = TOKENS[:, first : first + 3]
    _, cache, seen = extend(CONFIG, params_of(stacked), cache, tokens, counts)
    parts.append(np.asarray(seen["choices"]))
  recorded = np.concatenate(parts, axis=2)
  real = SEGMENTS.astype(bool)
  np.testing.assert_array_equal(recorded[:, real], np.asarray(stats["choices"])[:, real])


def test_choices_of_another_shape_are_refused():
  choices = np.zeros((2, 2, 9, K), np.int32)
  for bad in (choices[:1], choices[:, :1], choices[:, :, :8], choices[..., :1]):
    shape = str(bad.shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"have shape {shape}; .* need \(2, 2, 9, 2\)"):
      run(bad)
