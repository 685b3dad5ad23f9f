"""The decoder: thin Linen blocks, and plain functions that run them over layers.

Outside this package a model is `apply(params, tokens, ...)`: `hidden_states` and `forward` read
whole rows, `extend` appends tokens to a KV cache. Names carry shapes: B rows, T tokens a row, L
cache places a row, N query heads, G key/value heads, H head width, D residual width, V vocabulary.

Parameters are a nested dict, float32:

  embed_tokens/embedding [V, D]     norm/scale [D]     lm_head/kernel [D, V] unless tied
  layers_3/...           one layer, or
  layers_3_8/...         layers 3 to 8, alike, each array with a leading axis (`stack_layers`)

Stacked layers run in one `lax.scan`: the same numbers, and a compile time that does not grow with
depth.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from rome.models import context_parallel, expert_parallel, lora, router, sharding
from rome.models.attention import cached_attention, rope, rope_angles
from rome.models.config import DEFAULT_COMPUTE, ROW_COMPUTE, Compute, ModelConfig
from rome.models.layout import Stage, is_stacked, stages


@struct.dataclass
class Cache:
  """Keys and values of every layer, and how many places of each row are filled.

  Attributes:
    k, v: tuples of [B, L, G, H], one a layer, or [layers, B, L, G, H], one a stack of layers.
    length: [B] int32.
  """

  k: tuple
  v: tuple
  length: jax.Array


class RMSNorm(nn.Module):
  """RMSNorm of the last axis; its scale is `scale_init` at first."""

  epsilon: float
  scale_init: float = 1.0

  @nn.compact
  def __call__(self, x: chex.Array) -> chex.Array:
    scale = self.param("scale", nn.initializers.constant(self.scale_init), x.shape[-1:])
    # In rows: CPUs reduce arrays slowly whose first axis is 1. On a mesh a flat axis could not be
    # split as batch and length are.
    rows = x if sharding.in_use() else x.reshape(-1, x.shape[-1])
    y = rows.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
    y = y * jnp.expand_dims(scale, tuple(range(rows.ndim - 1)))
    return y.astype(x.dtype).reshape(x.shape)


class Linear(nn.Module):
  """A projection of the last axis, or of the last two; the kernel is [*inputs, *features]."""

  features: tuple[int, ...]
  inputs: int = 1  # how many trailing axes are contracted
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: chex.Array) -> chex.Array:
    into = x.shape[x.ndim - self.inputs :]
    inputs, outputs = range(self.inputs), range(self.inputs, self.inputs + len(self.features))
    init = nn.initializers.lecun_normal(in_axis=tuple(inputs), out_axis=tuple(outputs))
    kernel = self.param("kernel", init, (*into, *self.features)).astype(x.dtype)
    contracted = tuple(range(x.ndim - self.inputs, x.ndim)), tuple(inputs)
    y = jax.lax.dot_general(x, kernel, (contracted, ((), ())))
    if self.has_variable("params", "lora_a"):
      y = y + lora.project(x, self.variables["params"], self.inputs)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, self.features).astype(x.dtype)
      y = y + jnp.expand_dims(bias, tuple(range(y.ndim - bias.ndim)))
    return y


class Attention(nn.Module):
  """Grouped-query attention: over whole rows, or over a cache which it extends."""

  config: ModelConfig
  compute: Compute

  @nn.compact
  def __call__(self, x_BxTxD: chex.Array, where: dict) -> tuple[chex.Array, tuple | None]:
    c = self.config
    linear = functools.partial(Linear, use_bias=c.attention_bias)
    q = linear((c.num_attention_heads, c.head_dim), name="q_proj")(x_BxTxD)
    k = linear((c.num_key_value_heads, c.head_dim), name="k_proj")(x_BxTxD)
    v = linear((c.num_key_value_heads, c.head_dim), name="v_proj")(x_BxTxD)
    if c.qk_norm:
      norm = functools.partial(RMSNorm, c.rms_norm_eps)
      q = norm(c.query_norm_init, name="q_norm")(q)
      k = norm(name="k_norm")(k)
    q, k = (rope(x, where["rope"]) for x in (q, k))
    cache = None
    if where["cache"] is not None:
      # Places past the cache are those of padding tokens: dropped.
      put = functools.partial(_put, places_BxT=where["positions"])
      k, v = cache = tuple(put(old, new) for old, new in zip(where["cache"], (k, v), strict=True))
      y = cached_attention(q, k.astype(q.dtype), v.astype(q.dtype), where["positions"])
    else:
      y = context_parallel.attention(q, k, v, where["segment_ids"], self.compute.attention)
    return linear((c.hidden_size,), inputs=2, name="o_proj")(y), cache


def _put(cache_BxLxGxH: chex.Array, new_BxTxGxH: chex.Array, places_BxT: chex.Array) -> chex.Array:
  rows = jnp.arange(len(places_BxT))[:, None]
  new = new_BxTxGxH.astype(cache_BxLxGxH.dtype)
  return cache_BxLxGxH.at[rows, places_BxT].set(new, mode="drop", unique_indices=True)


class DenseMLP(nn.Module):
  """SwiGLU on every token."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BxTxD: chex.Array) -> chex.Array:
    f = self.config.intermediate_size
    gate = Linear((f,), name="gate_proj")(x_BxTxD)
    up = Linear((f,), name="up_proj")(x_BxTxD)
    return Linear((self.config.hidden_size,), name="down_proj")(jax.nn.silu(gate) * up)


class SparseMLP(nn.Module):
  """Router and experts."""

  config: ModelConfig
  compute: Compute

  @nn.compact
  def __call__(self, x_BxTxD: chex.Array, where: dict) -> tuple[chex.Array, router.Stats]:
    c = self.config
    d, f, e = c.hidden_size, c.moe_intermediate_size, c.num_experts
    init = nn.initializers.lecun_normal
    w_router = self.param("router", init(), (d, e))
    self.param("gate_up_proj", init(batch_axis=0), (e, d, 2 * f))
    self.param("down_proj", init(batch_axis=0), (e, f, d))
    held = self.variables["params"]
    gate_up, down = (lora.effective(held, name) for name in ("gate_up_proj", "down_proj"))
    return expert_parallel.sparse_layer(
      self.compute.experts,
      c.num_experts_per_tok,
      c.norm_topk_prob,
      x_BxTxD,
      w_router,
      gate_up.astype(x_BxTxD.dtype),
      down.astype(x_BxTxD.dtype),
      where["real"],
      where["choices"],
      split_length=where["cache"] is None,
    )


class Block(nn.Module):
  """One layer. `where` has what it needs to know of the tokens:

  `positions` [B, T] and `rope`, their angles; `real` [B, T] bool; `segment_ids` [B, T] for whole
  rows; `cache`, the keys and values of this layer, else None; `choices` [B, T, K], experts to
  visit, or None.
  """

  config: ModelConfig
  compute: Compute
  sparse: bool

  @nn.compact
  def __call__(
    self, x_BxTxD: chex.Array, where: dict
  ) -> tuple[chex.Array, tuple | None, router.Stats]:
    c = self.config
    norm = functools.partial(RMSNorm, c.rms_norm_eps)
    y, cache = Attention(c, self.compute, name="attn")(norm(name="input_norm")(x_BxTxD), where)
    length = "length" if where["cache"] is None else None
    x = sharding.constrain(x_BxTxD + y, "batch", length, None)
    y = norm(name="post_norm")(x)
    stats: router.Stats = {}
    if self.sparse:
      y, stats = SparseMLP(self.config, self.compute, name="mlp")(y, where)
    else:
      y = DenseMLP(self.config, name="mlp")(y)
    return sharding.constrain(x + y, "batch", length, None), cache, stats


def init_params(config: ModelConfig, key: chex.PRNGKey) -> dict:
  """Fresh float32 parameters, layers not stacked."""
  c = config
  x = jnp.zeros((1, 1, c.hidden_size))
  one = jnp.ones((1, 1), jnp.int32)
  where: dict = {"positions": one, "segment_ids": one, "real": one, "cache": None, "choices": None}
  where["rope"] = rope_angles(one, c.head_dim, c.rope_theta)
  keys = jax.random.split(key, c.num_hidden_layers + 2)
  with sharding.without_mesh():  # Modules run on one token here, which no mesh divides.
    params = {
      f"layers_{i}": Block(c, ROW_COMPUTE, c.is_sparse(i)).init(keys[i], x, where)["params"]
      for i in range(c.num_hidden_layers)
    }
  normal = nn.initializers.normal(c.hidden_size**-0.5)
  params["embed_tokens"] = {"embedding": normal(keys[-1], (c.vocab_size, c.hidden_size))}
  params["norm"] = {"scale": jnp.ones(c.hidden_size)}
  if not c.tie_word_embeddings:
    params["lm_head"] = {"kernel": normal(keys[-2], (c.hidden_size, c.vocab_size))}
  return params


def _remat(compute: Compute, run: Callable) -> Callable:
  if compute.remat == "none":
    return run
  keep = jax.checkpoint_policies.nothing_saveable
  if compute.remat == "dots":
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return jax.checkpoint(run, policy=keep)


def _run_stage(
  config: ModelConfig,
  compute: Compute,
  stage: Stage,
  x_BxTxD: chex.Array,
  where: dict,
  layers: dict,
) -> tuple[chex.Array, tuple, router.Stats]:
  """One stage. `layers` has its params, and its caches and choices or None, stacked if it is."""
  block = Block(config, compute, stage.sparse)

  def run(x: chex.Array, layer: dict) -> tuple[chex.Array, tuple]:
    x, *rest = block.apply({"params": layer["params"]}, x, where | layer)
    return x, tuple(rest)

  run = _remat(compute, run)
  if stage.stacked:
    x, (cache, stats) = jax.lax.scan(run, x_BxTxD, layers)
  else:
    x, (cache, stats) = run(x_BxTxD, layers)
    stats = jax.tree.map(lambda s: s[None], stats)
  return x, cache, stats


def _run_layers(
  config: ModelConfig,
  params: chex.ArrayTree,
  compute: Compute,
  tokens_BxT: chex.Array,
  where: dict,
  cache: Cache | None = None,
  choices_SxBxTxK: chex.Array | None = None,
) -> tuple[chex.Array, tuple, router.Stats]:
  """Embedding, layers and final norm: [B, T, D], new keys and values, router statistics."""
  params = sharding.constrain_params(lora.freeze(params))
  # Whole along the hidden axis, which rows are split over too: the compiler knows how to look rows
  # up in pieces of a vocabulary, but not in pieces of both.
  table = params["embed_tokens"]["embedding"].astype(compute.dtype)
  x = sharding.constrain(table, "vocab", None)[tokens_BxT]
  x = sharding.constrain(x, "batch", "length" if cache is None else None, None)
  where = where | {"rope": rope_angles(where["positions"], config.head_dim, config.rope_theta)}
  kv, all_stats, seen = [], [], 0
  for i, stage in enumerate(stages(config, is_stacked(params))):
    layers = {"params": params[stage.name], "cache": None, "choices": None}
    if cache is not None:
      layers["cache"] = (cache.k[i], cache.v[i])
    if stage.sparse and choices_SxBxTxK is not None:
      mine = choices_SxBxTxK[seen : seen + stage.count]
      layers["choices"] = mine if stage.stacked else mine[0]
    x, stage_kv, stats = _run_stage(config, compute, stage, x, where, layers)
    kv.append(stage_kv)
    if stage.sparse:
      all_stats.append(stats)
      seen += stage.count
  x = RMSNorm(config.rms_norm_eps).apply({"params": params["norm"]}, x)
  stats = jax.tree.map(lambda *s: jnp.concatenate(s), *all_stats) if all_stats else {}
  return x, tuple(kv), stats


def head_kernel(config: ModelConfig, params: chex.ArrayTree) -> chex.Array:
  """The output head [D, V]: logits are `hidden @ head_kernel`, in float32."""
  params = sharding.constrain_params(lora.freeze(params))
  if config.tie_word_embeddings:
    return params["embed_tokens"]["embedding"].T
  return lora.effective(params["lm_head"])


def logits_of(config: ModelConfig, params: chex.ArrayTree, hidden: chex.Array) -> chex.Array:
  """Logits [..., V] float32 of hidden states [..., D]."""
  kernel = head_kernel(config, params).astype(hidden.dtype)
  return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


def hidden_states(
  config: ModelConfig,
  params: chex.ArrayTree,
  tokens_BxT: chex.Array,
  segment_ids_BxT: chex.Array,
  positions_BxT: chex.Array,
  compute: Compute = DEFAULT_COMPUTE,
  choices_SxBxTxK: chex.Array | None = None,
) -> tuple[chex.Array, router.Stats]:
  """What the output head reads, of packed rows.

  Args:
    config: the model's sizes.
    params: as `init_params` gives, stacked or not.
    tokens_BxT: [B, T] int32.
    segment_ids_BxT: [B, T] int32; tokens attend within their segment only; 0 is padding.
    positions_BxT: [B, T] int32, place of each token in its own segment.
    compute: static, how to compute it.
    choices_SxBxTxK: [S, B, T, K] int32, experts to visit instead of the router's choice, as the
      statistics record them; S counts sparse layers.
  Returns:
    [B, T, D] in `compute.dtype`, after the final norm, and the router's statistics
    (`router.router_stats`), each with a leading axis S; `choices` is [S, B, T, K].
  Raises:
    ValueError: `choices_SxBxTxK` has another shape.
  """
  if choices_SxBxTxK is not None:
    sparse = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    want = (sparse, *tokens_BxT.shape, config.num_experts_per_tok)
    if choices_SxBxTxK.shape != want:
      raise ValueError(
        f"router choices to replay have shape {choices_SxBxTxK.shape}; this model and these tokens "
        f"need {want}: [sparse layers, rows, tokens, experts a token]"
      )
  where = {
    "positions": positions_BxT,
    "segment_ids": segment_ids_BxT,
    "real": segment_ids_BxT != 0,
  }
  x, _, stats = _run_layers(
    config, params, compute, tokens_BxT, where, choices_SxBxTxK=choices_SxBxTxK
  )
  return x, stats


def forward(
  config: ModelConfig,
  params: chex.ArrayTree,
  tokens_BxT: chex.Array,
  segment_ids_BxT: chex.Array,
  positions_BxT: chex.Array,
  compute: Compute = DEFAULT_COMPUTE,
) -> chex.Array:
  """Logits of packed rows, [B, T, V] float32: place t predicts token t + 1. See `hidden_states`.

  Training scores with `head_logps` instead, which never holds them all.
  """
  x, _ = hidden_states(config, params, tokens_BxT, segment_ids_BxT, positions_BxT, compute)
  return logits_of(config, params, x)


def init_cache(
  config: ModelConfig, batch: int, length: int, stacked: bool = False, dtype: str = "float32"
) -> Cache:
  """An empty cache of `batch` rows with `length` places each, for parameters stacked or not."""
  shape = (batch, length, config.num_key_value_heads, config.head_dim)

  def zeros() -> tuple[chex.Array, ...]:
    return tuple(
      jnp.zeros((stage.count, *shape) if stage.stacked else shape, dtype)
      for stage in stages(config, stacked)
    )

  return Cache(k=zeros(), v=zeros(), length=jnp.zeros(batch, jnp.int32))


def extend_hidden(
  config: ModelConfig,
  params: chex.ArrayTree,
  cache: Cache,
  tokens_BxT: chex.Array,
  counts_B: chex.Array,
  compute: Compute = ROW_COMPUTE,
) -> tuple[chex.Array, Cache, router.Stats]:
  """What the output head reads at every new place, [B, T, D]: otherwise as `extend`."""
  t, length = tokens_BxT.shape[1], cache.k[0].shape[-3]
  offset = jnp.arange(t)[None]
  real = offset < counts_B[:, None]
  # Padding gets distinct places past the end: their writes are dropped and stay unique.
  places = jnp.where(real, cache.length[:, None] + offset, length + offset)
  where = {"positions": places, "real": real}
  x, kv, stats = _run_layers(config, params, compute, tokens_BxT, where, cache)
  k, v = zip(*kv, strict=True)
  return x, Cache(k=k, v=v, length=cache.length + counts_B), stats


def extend(
  config: ModelConfig,
  params: chex.ArrayTree,
  cache: Cache,
  tokens_BxT: chex.Array,
  counts_B: chex.Array,
  compute: Compute = ROW_COMPUTE,
) -> tuple[chex.Array, Cache, router.Stats]:
  """Appends tokens to each row of a cache.

  With `dense` experts a row's bits depend on that row and its place in the batch alone, never on
  its neighbours.

  Args:
    config: the model's sizes.
    params: as `init_params` gives, stacked or not.
    cache: the rows so far.
    tokens_BxT: [B, T] int32, new tokens, left-aligned.
    counts_B: [B] int32 in 0..T, how many of them are real.
    compute: static, how to compute it.
  Returns:
    logits [B, V] float32 after each row's last real token (garbage for rows with count 0), the new
    cache, and the router's statistics as `hidden_states` returns them.
  """
  x, cache, stats = extend_hidden(config, params, cache, tokens_BxT, counts_B, compute)
  last = jnp.maximum(counts_B - 1, 0)
  x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
  return logits_of(config, params, x), cache, stats
