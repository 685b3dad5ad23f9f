"""Adapters: nothing at first, they alone learn, and merging keeps what they say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from rome import models
from rome.models import lora

MICRO = models.PRESETS["micro"]
# Layer 0 dense, 1 and 2 sparse; an untied head: every target exists.
MIXED = dataclasses.replace(
  MICRO, num_hidden_layers=3, mlp_only_layers=(0,), intermediate_size=24, tie_word_embeddings=False
)
KEY = jax.random.key(7)
COMPUTE = models.Compute(experts="dense")
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 256, (2, 9)).astype(np.int32)
SEGMENTS = np.ones_like(TOKENS)
POSITIONS = np.tile(np.arange(9, dtype=np.int32), (2, 1))

init = jax.jit(models.init_params, static_argnums=0)
forward = jax.jit(models.forward, static_argnums=(0, 5))
extend = jax.jit(models.extend, static_argnums=0)


@functools.cache
def base(stacked=False):
  params = init(MIXED, jax.random.key(0))
  return models.stack_layers(MIXED, params) if stacked else params


def adapted(stacked=False, targets=tuple(lora.TARGETS), rank=3, alpha=5.0):
  return lora.add_lora(MIXED, base(stacked), KEY, rank, alpha, targets)


def stirred(params, seed=1):
  """With B away from zero, so that adapters say something."""
  rng = np.random.default_rng(seed)
  flat = traverse_util.flatten_dict(params)
  for path in sorted(flat):
    if path[-1].endswith("lora_b"):
      flat[path] = jnp.asarray(rng.normal(size=flat[path].shape, scale=0.2), jnp.float32)
  return traverse_util.unflatten_dict(flat)


def say(params):
  return np.asarray(forward(MIXED, params, TOKENS, SEGMENTS, POSITIONS, COMPUTE))


@jax.jit
def loss_of(params):
  logits = models.forward(MIXED, params, TOKENS, SEGMENTS, POSITIONS)
  logp, _ = models.token_logps(logits, TOKENS, models.Sampling())
  return -logp[:, 1:].mean()


@pytest.mark.slow
def test_fresh_adapters_change_no_bit():
  """Operation by operation; compiled, what follows an adapter is fused otherwise and rounds so."""
  params = base(stacked=True), adapted(stacked=True)
  with jax.disable_jit():
    plain, fresh = (
      models.forward(MIXED, p, TOKENS[:, :4], SEGMENTS[:, :4], POSITIONS[:, :4], COMPUTE)
      for p in params
    )
  assert np.asarray(plain).tobytes() == np.asarray(fresh).tobytes()
  np.testing.assert_allclose(say(params[1]), say(params[0]), atol=1e-5)


def test_where_the_arrays_lie():
  flat = {
    "/".join(path): x.shape
    for path, x in traverse_util.flatten_dict(adapted(stacked=True)).items()
    if path[-1].endswith(lora.PARTS)
  }
  stack = {k.removeprefix("layers_1_2/"): v for k, v in flat.items() if k.startswith("layers_1_2")}
  assert stack == {
    "attn/q_proj/lora_a": (2, 16, 3), "attn/q_proj/lora_b": (2, 3, 2, 8),
    "attn/k_proj/lora_a": (2, 16, 3), "attn/k_proj/lora_b": (2, 3, 1, 8),
    "attn/v_proj/lora_a": (2, 16, 3), "attn/v_proj/lora_b": (2, 3, 1, 8),
    "attn/o_proj/lora_a": (2, 2, 8, 3), "attn/o_proj/lora_b": (2, 3, 16),
    "mlp/gate_up_proj_lora_a": (2, 4, 16, 3), "mlp/gate_up_proj_lora_b": (2, 4, 3, 32),
    "mlp/down_proj_lora_a": (2, 4, 16, 3), "mlp/down_proj_lora_b": (2, 4, 3, 16),
    **dict.fromkeys([f"attn/{x}_proj/lora_alpha" for x in "qkvo"], (2,)),
    "mlp/gate_up_proj_lora_alpha": (2,), "mlp/down_proj_lora_alpha": (2,),
  }  # fmt: skip
  assert flat["lm_head/lora_a"] == (16, 3) and flat["lm_head/lora_b"] == (3, 264)
  assert flat["layers_0/mlp/down_proj/lora_a"] == (24, 3) and flat["lm_head/lora_alpha"] == ()


def test_a_projection_is_what_the_docstring_says():
  """In float64: x W + alpha / r (x A) B, over one axis and over two."""
  x, a, b = RNG.normal(size=(5, 4, 6)), RNG.normal(size=(4, 6, 2)), RNG.normal(size=(2, 3))
  want = np.einsum("nhd,hdr,ro->no", x, a, b) * 7 / 2
  node = jax.tree.map(jnp.float32, {"lora_a": a, "lora_b": b, "lora_alpha": 7.0})
  got = lora.project(jnp.asarray(x, jnp.float32), node, 2)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("target", lora.TARGETS)
def test_each_target_alone_speaks_and_merges(target):
  params = stirred(adapted(targets=(target,)))
  merged = lora.merge_lora(params)
  assert jax.tree.structure(merged) == jax.tree.structure(base())
  said = say(params)
  assert np.abs(said - say(base())).max() > 1e-3
  np.testing.assert_allclose(say(merged), said, atol=1e-5)
  changed = [
    "/".join(path)
    for path, x in traverse_util.flatten_dict(merged).items()
    if (x != traverse_util.flatten_dict(base())[path]).any()
  ]
  name = target.removeprefix("experts.")
  assert changed and all(f"/{name}".endswith(f"/{c.split('/')[-1]}") or name in c for c in changed)


@pytest.mark.slow
def test_merging_against_einsum():
  params = stirred(adapted(stacked=True))
  merged = lora.merge_lora(params)
  node = params["layers_1_2"]
  q, mlp = node["attn"]["q_proj"], node["mlp"]
  want = q["kernel"] + np.einsum("ldr,lrnh->ldnh", q["lora_a"], q["lora_b"]) * 5 / 3
  np.testing.assert_allclose(merged["layers_1_2"]["attn"]["q_proj"]["kernel"], want, atol=1e-5)
  a, b = mlp["gate_up_proj_lora_a"], mlp["gate_up_proj_lora_b"]
  want = mlp["gate_up_proj"] + np.einsum("ledr,lerf->ledf", a, b) * 5 / 3
  np.testing.assert_allclose(merged["layers_1_2"]["mlp"]["gate_up_proj"], want, atol=1e-5)


@pytest.mark.slow
def test_stacked_is_one_by_one():
  one_by_one = models.stack_layers(MIXED, adapted(stacked=False))
  jax.tree.map(np.testing.assert_array_equal, adapted(stacked=True), one_by_one)
  params = stirred(adapted())
  np.testing.assert_allclose(say(models.stack_layers(MIXED, params)), say(params), atol=1e-5)


@pytest.mark.slow
def test_the_cache_serves_adapters():
  params = stirred(adapted(stacked=True))
  cache = models.init_cache(MIXED, 2, 9, stacked=True)
  for first in (0, 3, 6):
    logits, cache, _ = extend(
      MIXED, params, cache, TOKENS[:, first : first + 3], np.array([3, 3], np.int32)
    )
  np.testing.assert_allclose(logits, say(params)[:, -1], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("stacked", "remat"), [(False, "none"), (True, "layer")])
def test_gradients_reach_adapters_alone(stacked, remat):
  compute = models.Compute(experts="padded", remat=remat)

  @jax.jit
  @jax.grad
  def gradient(params):
    logits = models.forward(MIXED, params, TOKENS, SEGMENTS, POSITIONS, compute)
    return models.token_logps(logits, TOKENS, models.Sampling())[0].sum()

  gradients = traverse_util.flatten_dict(gradient(stirred(adapted(stacked))))
  for path, value in gradients.items():
    trains = path[-1].endswith(("lora_a", "lora_b"))
    assert (np.abs(value).max() > 0) == trains, path


@pytest.mark.slow
def test_a_frozen_kernel_costs_no_gradient():
  """The backward pass of a tree with thin adapters has far fewer products than a plain one."""
  thin = adapted(targets=("q_proj",), rank=1)

  def flops(params, argument):
    def loss(part):
      logits = models.forward(MIXED, lora.join(*argument(part)), TOKENS, SEGMENTS, POSITIONS)
      return logits.sum()

    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    return compiled.cost_analysis()["flops"]

  trainable, frozen = lora.split(thin)
  apart = flops(trainable, lambda part: (part, frozen))
  whole = flops(thin, lambda part: (part, {}))
  plain = flops(base(), lambda part: (part, {}))
  assert apart <= whole < 0.85 * plain


def test_split_and_join():
  params = adapted()
  trainable, frozen = lora.split(params)
  names = {path[-1] for path in traverse_util.flatten_dict(trainable)}
  assert all(name.endswith(("lora_a", "lora_b")) for name in names)
  assert jax.tree.structure(lora.join(trainable, frozen)) == jax.tree.structure(params)
  mask = lora.trainable_mask(params)
  assert sum(jax.tree.leaves(mask)) == len(jax.tree.leaves(trainable))
  assert lora.split(base()) == (base(), {}) and all(jax.tree.leaves(lora.trainable_mask(base())))


@pytest.mark.slow
def test_training_moves_adapters_alone_and_merges():
  """With optax over the whole tree: no moments of, and no decay on, what is frozen."""
  params = before = adapted()
  mask = lora.trainable_mask(params)
  optimizer = optax.masked(optax.adamw(2e-2, weight_decay=0.1), mask)
  state = optimizer.init(params)
  moments = sum(x.size for x in jax.tree.leaves(state)) - 1  # the count
  assert moments == 2 * sum(x.size for x in jax.tree.leaves(lora.split(params)[0]))

  @jax.jit
  def update(params, state):
    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer.update(gradients, state, params)
    return loss, optax.apply_updates(params, updates), state

  losses = []
  for _ in range(30):
    loss, params, state = update(params, state)
    losses.append(float(loss))
  assert losses[-1] < 0.6 * losses[0]
  for path, value in traverse_util.flatten_dict(params).items():
    same = value.tobytes() == traverse_util.flatten_dict(before)[path].tobytes()
    assert same != path[-1].endswith(("lora_a", "lora_b")), path
  np.testing.assert_allclose(say(lora.merge_lora(params)), say(params), atol=1e-5)


def test_alpha_scales():
  small, large = (stirred(adapted(targets=("lm_head",), alpha=alpha)) for alpha in (2.0, 6.0))
  moved = [say(params) - say(base()) for params in (small, large)]
  np.testing.assert_allclose(3 * moved[0], moved[1], atol=1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"targets": ("q_proj", "query")}, "target 'query' is unknown; known: q_proj, .*lm_head"),
    ({"targets": ()}, "name no projection; known: q_proj"),
    ({"rank": 0}, "rank must be at least 1, got 0"),
    ({"alpha": 0.0}, "alpha must be a positive number, got 0.0"),
    ({"alpha": float("nan")}, "alpha must be a positive number, got nan"),
    ({"config": MICRO, "targets": ("up_proj",)}, "'up_proj': the model has no dense layer"),
    ({"config": MICRO, "targets": ("lm_head",)}, "'lm_head': the model's head is its embedding"),
    (
      {"config": models.PRESETS["smollm2_135m"], "targets": ("experts.down_proj",)},
      "'experts.down_proj': the model has no sparse layer",
    ),
  ],
)
def test_mistakes_are_named(change, message):
  settings = {"config": MIXED, "rank": 2, "alpha": 4.0, "targets": ("q_proj",)} | change
  config = settings.pop("config")
  with pytest.raises(ValueError, match=message):
    lora.add_lora(config, base(), KEY, **settings)


def test_twice_is_refused_and_so_is_merging_nothing():
  with pytest.raises(ValueError, match="have lora adapters already"):
    lora.add_lora(MIXED, adapted(targets=("q_proj",)), KEY, 2, 4.0, ("k_proj",))
  with pytest.raises(ValueError, match="no lora adapters to merge"):
    lora.merge_lora(base())
