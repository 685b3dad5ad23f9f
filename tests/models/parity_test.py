"""The decoder is that of transformers: logits, loss, gradient, router statistics, decoding.

The goldens are random models with the outputs of transformers on them, see `goldens/make.py`.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from rome import models

GOLDENS = pathlib.Path(__file__).parent / "goldens"
NAMES = (
  "moe",
  "moe_theta",
  "moe_dense_first",
  "moe_tied",
  "moe_no_norm_topk",
  "moe_sparse_step",
  "qwen3",
  "llama",
)


@functools.cache
def golden(name, stacked=False):
  """Sizes, parameters, tokens, logits and the rest of a golden."""
  path = GOLDENS / name
  config, params = models.load(path, stacked=stacked)
  tokens, logits = np.load(path / "input_ids.npy"), np.load(path / "logits.npy")
  return config, params, tokens, logits, json.loads((path / "expected.json").read_text())


def whole(tokens):
  """Segment ids and positions of rows of one segment."""
  where = jnp.arange(tokens.shape[1])[None]
  return jnp.ones_like(tokens), jnp.broadcast_to(where, tokens.shape)


def implementations(name):
  return ("padded", "dense", "ragged") if name.startswith("moe") else ("padded",)


# All of them compile for minutes; the fast ones see every golden, impl and layout once.
CASES = [
  pytest.param(name, impl, stacked, marks=[] if fast else pytest.mark.slow)
  for name in NAMES
  for impl in implementations(name)
  for stacked in (False, True)
  for fast in [(impl == "padded" and stacked) or (name == "moe_dense_first" and not stacked)]
]
LAYOUTS = [pytest.param(False, marks=pytest.mark.slow), True]


@functools.partial(jax.jit, static_argnums=(0, 1))
def logits_and_stats(config, compute, params, tokens):
  hidden, stats = models.hidden_states(config, params, tokens, *whole(tokens), compute)
  return hidden @ models.head_kernel(config, params), stats


def load_balancing_loss(config, stats, tokens):
  """experts * sum over experts of copies a token * mean probability, over all layers at once."""
  count = tokens.size * len(stats["load"])
  load, prob = (np.asarray(stats[k], np.float64).sum(0) / count for k in ("load", "prob"))
  return config.num_experts * load @ prob


@pytest.mark.slow
@pytest.mark.parametrize(("name", "impl", "stacked"), CASES)
def test_logits_and_router(name, impl, stacked):
  config, params, tokens, logits, want = golden(name, stacked)
  assert models.is_stacked(params) == (stacked and name != "moe_sparse_step")
  got, stats = logits_and_stats(config, models.Compute(experts=impl), params, tokens)
  np.testing.assert_allclose(got, logits, rtol=0, atol=1e-5)
  if config.num_experts:
    loss = load_balancing_loss(config, stats, tokens)
    np.testing.assert_allclose(loss, want["load_balancing_loss"], rtol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def extend(config, params, cache, tokens, counts):
  return models.extend(config, params, cache, tokens, counts)[:2]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stacked", LAYOUTS)
def test_prefill_and_decode(name, stacked):
  """Rows of different length are prefilled, then decoded one token at a time."""
  config, params, tokens, logits, _ = golden(name, stacked)
  counts = np.array([9, 5])
  cache = models.init_cache(config, 2, 32, stacked=models.is_stacked(params))
  got, cache = extend(config, params, cache, tokens[:, :9], counts)
  rows, one = np.arange(2), np.ones(2, np.int32)
  np.testing.assert_allclose(got, logits[rows, counts - 1], rtol=0, atol=1e-5)
  for i in range(10):
    step = tokens[rows, counts + i][:, None]
    got, cache = extend(config, params, cache, step, one)
    np.testing.assert_allclose(got, logits[rows, counts + i], rtol=0, atol=1e-5)


FAST_GRADIENTS = [("moe_dense_first", "none"), ("llama", "none")]


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_and_gradient(config, compute, params, tokens):
  def loss(params):
    logits = models.forward(config, params, tokens, *whole(tokens), compute)
    logp, _ = models.token_logps(logits, tokens, models.Sampling())
    return -logp[:, 1:].mean()

  return jax.value_and_grad(loss)(params)


GRADIENTS = [
  pytest.param(n, remat, marks=[] if (n, remat) in FAST_GRADIENTS else pytest.mark.slow)
  for n in NAMES
  for remat in ("none", "layer")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "remat"), GRADIENTS)
def test_loss_and_gradient(name, remat):
  config, params, tokens, _, want = golden(name, stacked=True)
  loss, gradient = loss_and_gradient(config, models.Compute(remat=remat), params, tokens)
  np.testing.assert_allclose(loss, want["loss"], rtol=1e-6)
  squares = [np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradient)]
  np.testing.assert_allclose(np.sqrt(sum(squares)), want["grad_norm"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stacked", [False, True])
def test_a_saved_golden_is_bit_equal(name, stacked, tmp_path):
  config, params, *_ = golden(name, stacked)
  models.save(tmp_path, config, params, shard_bytes=50_000)
  again, loaded = models.load(tmp_path, stacked=stacked)
  assert again == config
  loaded, params = (traverse_util.flatten_dict(p, sep="/") for p in (loaded, params))
  assert loaded.keys() == params.keys()
  for key, value in params.items():
    np.testing.assert_array_equal(loaded[key], value, strict=True, err_msg=key)
