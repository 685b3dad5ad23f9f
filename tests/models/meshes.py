"""What tests of sharding share: small models, packed rows, a loss that every parameter moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rome import models
from rome.models import sharding
from rome.models.decoder import logits_of

# One dense layer, then sparse ones.
MOE = models.ModelConfig(
  vocab_size=64,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  num_experts=4,
  num_experts_per_tok=2,
  moe_intermediate_size=16,
  intermediate_size=24,
  mlp_only_layers=(0,),
  tie_word_embeddings=False,
)
DENSE = models.ModelConfig(
  vocab_size=64,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  intermediate_size=24,
  qk_norm=False,
  attention_bias=True,
)
DEEP = dataclasses.replace(MOE, num_hidden_layers=3)  # two sparse layers, which can be stacked
ROWS, LENGTH = 8, 32


def batch(rows=ROWS, length=LENGTH, seed=0):
  """Tokens, segment ids, positions [rows, length]: up to three segments a row, then padding."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 64, (rows, length)).astype(np.int32)
  cuts = np.sort(rng.integers(1, length + 1, (rows, 3)), axis=1)
  cuts[0] = length  # one row is one segment, so that keys come from everywhere
  place = np.arange(length)[None]
  segment = 1 + (place[..., None] >= cuts[:, None, :]).sum(-1)
  first = np.where(segment == 1, 0, np.take_along_axis(cuts, np.clip(segment - 2, 0, 2), 1))
  segment_ids = np.where(segment <= 3, segment, 0).astype(np.int32)
  return tokens, segment_ids, (place - first).astype(np.int32)


@functools.cache
def params_of(config, stacked=False):
  params = jax.jit(models.init_params, static_argnums=0)(config, jax.random.key(0))
  # Biases begin at zero: elsewhere a lost one would go unnoticed.
  params = jax.tree.map(lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), params)
  return models.stack_layers(config, params) if stacked else params


def loss(config, compute, params, tokens, segment_ids, positions):
  """A fixed weighting of all log-probs and router statistics; also the experts chosen, if any."""
  x, stats = models.hidden_states(config, params, tokens, segment_ids, positions, compute)
  logps = jax.nn.log_softmax(logits_of(config, params, x))
  weight = jnp.sin(jnp.arange(logps.size, dtype=jnp.float32)).reshape(logps.shape)
  total = jnp.sum(logps * weight * (segment_ids != 0)[..., None]) / tokens.size
  for name in ("load", "prob", "z"):
    if name in stats:
      sums = stats[name].reshape(-1)
      total += 1e-2 * jnp.mean(sums * jnp.cos(jnp.arange(sums.size)))
  return total, stats.get("choices")


# ((loss, choices), gradients)
gradients = jax.jit(jax.value_and_grad(loss, argnums=2, has_aux=True), static_argnums=(0, 1))


def put(mesh, params, rows):
  """Parameters and rows, laid out on `mesh`."""
  spec = sharding.axes_spec(("batch", "length"), mesh.axis_names)
  by_row = jax.sharding.NamedSharding(mesh, spec)
  return (
    jax.device_put(params, sharding.param_shardings(mesh, params)),
    tuple(jax.device_put(x, by_row) for x in rows),
  )


def mesh_of(count=8, **sizes):
  """A mesh of the first `count` devices."""
  return sharding.make_mesh(**sizes, devices=jax.devices()[:count])


def assert_same_gradients(got, want, limit=1e-5):
  """Leaf by leaf: the largest difference, and its norm by the gradient's."""

  def check(path, a, b):
    a, b = np.asarray(a), np.asarray(b)
    name = jax.tree_util.keystr(path)
    assert np.abs(a - b).max() <= limit, name
    assert np.linalg.norm(a - b) <= limit * np.linalg.norm(b), name
    assert np.linalg.norm(b) > 0, name

  jax.tree_util.tree_map_with_path(check, got, want)
