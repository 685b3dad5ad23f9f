"""The ROME decoder: a Qwen3-MoE transformer as thin Linen modules.

Outside this package a model is `apply(params, tokens, ...)`: `forward` scores whole rows, `extend`
appends tokens to a KV cache. Names carry shapes: B rows, T tokens a row, L cache places a row, N
query heads, G key/value heads, H head width, D residual width, V vocabulary.

Left out for now: scan and remat over layers, mixed precision, sharding rules, dense layers.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from rome.models.config import ModelConfig
from rome.models.moe import EXPERT_IMPLS, route


@struct.dataclass
class Cache:
  """Keys and values of every layer, and how many places of each row are filled.

  Attributes:
    k, v: tuples of [B, L, G, H], one a layer.
    length: [B] int32.
  """

  k: tuple
  v: tuple
  length: jax.Array


def rope(x_BxTxNxH: chex.Array, positions_BxT: chex.Array, theta: float) -> chex.Array:
  """Rotary position embedding, the half-split layout of Llama and Qwen."""
  half = x_BxTxNxH.shape[-1] // 2
  freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions_BxT[..., None, None].astype(jnp.float32) * freq[None, None, None]
  x1, x2 = x_BxTxNxH[..., :half], x_BxTxNxH[..., half:]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


class Attention(nn.Module):
  """Grouped-query attention with qk-norm."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BxTxD: chex.Array,
    positions_BxT: chex.Array,
    mask_Bx1xTxS: chex.Array,
    cache: tuple[chex.Array, ...] | None = None,
  ) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
    c = self.config
    init = nn.initializers.lecun_normal()
    norm = functools.partial(nn.RMSNorm, epsilon=c.rms_norm_eps)

    def project(heads: int, name: str) -> chex.Array:
      return nn.DenseGeneral((heads, c.head_dim), use_bias=False, kernel_init=init, name=name)(
        x_BxTxD
      )

    q_init = nn.initializers.constant(c.query_norm_init)
    q = norm(scale_init=q_init, name="q_norm")(project(c.num_attention_heads, "q_proj"))
    q = rope(q, positions_BxT, c.rope_theta)
    k = norm(name="k_norm")(project(c.num_key_value_heads, "k_proj"))
    k = rope(k, positions_BxT, c.rope_theta)
    v = project(c.num_key_value_heads, "v_proj")
    if cache is not None:
      k_cache, v_cache, rows_Bx1, places_BxT = cache
      # Places past the cache are those of padding tokens: dropped.
      k = k_cache.at[rows_Bx1, places_BxT].set(k, mode="drop", unique_indices=True)
      v = v_cache.at[rows_Bx1, places_BxT].set(v, mode="drop", unique_indices=True)
    y = jax.nn.dot_product_attention(q, k, v, mask=mask_Bx1xTxS, implementation="xla")
    y = nn.DenseGeneral(
      c.hidden_size, axis=(-2, -1), use_bias=False, kernel_init=init, name="o_proj"
    )(y)
    return y, (k, v)


class SparseMLP(nn.Module):
  """Router and experts; the router works in float32."""

  config: ModelConfig
  impl: str

  @nn.compact
  def __call__(self, x_BxTxD: chex.Array) -> chex.Array:
    c = self.config
    d, f, e = c.hidden_size, c.moe_intermediate_size, c.num_experts
    init = nn.initializers.lecun_normal
    router = self.param("router", init(), (d, e))
    gate_up = self.param("gate_up_proj", init(batch_axis=0), (e, d, 2 * f))
    down = self.param("down_proj", init(batch_axis=0), (e, f, d))
    x_NxD = x_BxTxD.reshape(-1, d)
    logits_NxE = x_NxD.astype(jnp.float32) @ router.astype(jnp.float32)
    weights, experts = route(logits_NxE, c.num_experts_per_tok, c.norm_topk_prob)
    return EXPERT_IMPLS[self.impl](x_NxD, weights, experts, gate_up, down).reshape(x_BxTxD.shape)


class Decoder(nn.Module):
  """Token ids to logits."""

  config: ModelConfig
  impl: str = "padded"

  @nn.compact
  def __call__(
    self,
    tokens_BxT: chex.Array,
    positions_BxT: chex.Array,
    mask_Bx1xTxS: chex.Array,
    cache: Cache | None = None,
  ) -> tuple[chex.Array, list[tuple[chex.Array, chex.Array]]]:
    c = self.config
    norm = functools.partial(nn.RMSNorm, epsilon=c.rms_norm_eps)
    embed = nn.Embed(
      c.vocab_size,
      c.hidden_size,
      embedding_init=nn.initializers.normal(c.hidden_size**-0.5),
      name="embed_tokens",
    )
    x = embed(tokens_BxT)
    kv = []
    for i in range(c.num_hidden_layers):
      layer_cache = None
      if cache is not None:
        rows = jnp.arange(tokens_BxT.shape[0])[:, None]
        layer_cache = (cache.k[i], cache.v[i], rows, positions_BxT)
      y, layer_kv = Attention(c, name=f"layers_{i}_attn")(
        norm(name=f"layers_{i}_input_norm")(x), positions_BxT, mask_Bx1xTxS, layer_cache
      )
      x = x + y
      y = norm(name=f"layers_{i}_post_norm")(x)
      x = x + SparseMLP(c, self.impl, name=f"layers_{i}_mlp")(y)
      kv.append(layer_kv)
    x = norm(name="norm")(x)
    if c.tie_word_embeddings:
      logits = embed.attend(x)
    else:
      logits = nn.Dense(c.vocab_size, use_bias=False, name="lm_head")(x)
    return logits.astype(jnp.float32), kv


def init_params(config: ModelConfig, key: chex.PRNGKey) -> dict:
  """Fresh float32 parameters: a nested dict."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  mask = jnp.ones((1, 1, 2, 2), bool)
  return Decoder(config).init(key, tokens, tokens, mask)["params"]


def forward(
  config: ModelConfig,
  params: chex.ArrayTree,
  tokens_BxT: chex.Array,
  segment_ids_BxT: chex.Array,
  positions_BxT: chex.Array,
  impl: str = "padded",
) -> chex.Array:
  """Logits of packed rows.

  Args:
    config: the model's sizes.
    params: as `init_params` gives.
    tokens_BxT: [B, T] int32.
    segment_ids_BxT: [B, T] int32; tokens attend within their segment only; 0 is padding.
    positions_BxT: [B, T] int32, place of each token in its own segment.
    impl: expert implementation, a key of `moe.EXPERT_IMPLS`.
  Returns:
    [B, T, V] float32 logits of the *next* token.
  """
  t = tokens_BxT.shape[1]
  same = segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :]
  mask = (same & jnp.tril(jnp.ones((t, t), bool))[None])[:, None]
  logits, _ = Decoder(config, impl).apply({"params": params}, tokens_BxT, positions_BxT, mask)
  return logits


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
  """An empty cache of `batch` rows with `length` places each."""
  shape = (batch, length, config.num_key_value_heads, config.head_dim)

  def zeros() -> tuple[chex.Array, ...]:
    return tuple(jnp.zeros(shape, jnp.float32) for _ in range(config.num_hidden_layers))

  return Cache(k=zeros(), v=zeros(), length=jnp.zeros(batch, jnp.int32))


def extend(
  config: ModelConfig,
  params: chex.ArrayTree,
  cache: Cache,
  tokens_BxT: chex.Array,
  counts_B: chex.Array,
) -> tuple[chex.Array, Cache]:
  """Appends tokens to each row of a cache.

  The experts run `dense`, so a row's bits depend on that row and its place in the batch alone,
  never on its neighbours.

  Args:
    config: the model's sizes.
    params: as `init_params` gives.
    cache: the rows so far.
    tokens_BxT: [B, T] int32, new tokens, left-aligned.
    counts_B: [B] int32 in 0..T, how many of them are real.
  Returns:
    logits [B, V] float32 after each row's last real token (garbage for rows with count 0), and the
    new cache.
  """
  t, length = tokens_BxT.shape[1], cache.k[0].shape[1]
  offset = jnp.arange(t)[None]
  real = offset < counts_B[:, None]
  # Padding gets distinct places past the end: their writes are dropped and stay unique.
  places = jnp.where(real, cache.length[:, None] + offset, length + offset)
  mask = (jnp.arange(length)[None, None] <= places[:, :, None])[:, None]
  logits, kv = Decoder(config, "dense").apply({"params": params}, tokens_BxT, places, mask, cache)
  last = jnp.maximum(counts_B - 1, 0)
  logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
  k, v = zip(*kv, strict=True)
  return logits, Cache(k=k, v=v, length=cache.length + counts_B)
