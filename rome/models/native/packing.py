"""Weights as the native forward pass reads them: panels of 64 columns, each one stream of memory.

A matrix [K, F] becomes [ceil(F / 64), K, 64], padded with zeros. q, k and v are one matrix; gate
and up are one whose panels hold 32 gates and the 32 ups that belong to them, so that the activation
is applied where the sums are made. The router has panels of 16. The embedding and vectors that are
added or multiplied along the hidden axis are padded to whole vectors of 16.

Left out: bfloat16 or quantised weights. This path promises the float32 numbers of the decoder.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct

from rome.models import lora
from rome.models.attention import rope_angles
from rome.models.config import ModelConfig
from rome.models.layout import is_stacked, unstack_layers

PANEL = 64
LANES = 16


@struct.dataclass
class Packed:
  """A model for `extend` and `logits`.

  Attributes:
    embedding: [V, D padded to 16].
    rope: [positions, H], cosines and then sines.
    norm: [D padded to 16].
    head: [ceil(V / 64), D, 64].
    layers: a tuple of 11 arrays a layer, in the order of `struct layer` in native.h; [0] if absent.
  """

  embedding: jax.Array
  rope: jax.Array
  norm: jax.Array
  head: jax.Array
  layers: tuple[tuple[jax.Array, ...], ...]


def _padded(x: chex.Array, multiple: int) -> chex.Array:
  """`x` with its last axis padded with zeros to a multiple."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)])


def _panels(x: chex.Array, width: int = PANEL) -> chex.Array:
  """[..., K, F] -> [..., ceil(F / width), K, width]."""
  x = _padded(x, width)
  return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, width), -2, -3)


def _gated(gate: chex.Array, up: chex.Array) -> chex.Array:
  """Two [..., K, F] -> [..., ceil(F / 32), K, 64], gates in front of their ups."""
  return jnp.concatenate([_panels(gate, PANEL // 2), _panels(up, PANEL // 2)], axis=-1)


def _attention(node: dict) -> tuple[chex.Array, ...]:
  """q, k, v joined, their bias, scales of the norms, output projection and its bias."""
  none = jnp.zeros(0)
  projections = [node[f"{name}_proj"] for name in "qkv"]
  d = projections[0]["kernel"].shape[0]
  qkv = jnp.concatenate([p["kernel"].reshape(d, -1) for p in projections], axis=1)
  bias = o_bias = none
  if "bias" in projections[0]:
    bias = _padded(jnp.concatenate([p["bias"].reshape(-1) for p in projections]), PANEL)
    o_bias = _padded(node["o_proj"]["bias"], PANEL)
  norms = (node[name]["scale"] if name in node else none for name in ("q_norm", "k_norm"))
  return (_panels(qkv), bias, *norms, _panels(node["o_proj"]["kernel"].reshape(-1, d)), o_bias)


def _mlp(node: dict) -> tuple[chex.Array, ...]:
  """Router, gate and up joined, down."""
  if "router" not in node:
    gate, up, down = (node[f"{name}_proj"]["kernel"] for name in ("gate", "up", "down"))
    return jnp.zeros(0), _gated(gate, up), _panels(down)
  gate, up = jnp.split(node["gate_up_proj"], 2, axis=-1)
  return _panels(node["router"], LANES), _gated(gate, up), _panels(node["down_proj"])


def pack(config: ModelConfig, params: chex.ArrayTree, max_length: int | None = None) -> Packed:
  """Lays weights out for `extend` and `logits`; a pure function, meant to be jitted.

  Args:
    config: static, the model's sizes.
    params: as `init_params` gives, stacked or not; adapters are merged into their projections.
    max_length: static, one more than the last position that can be served;
      `config.max_position_embeddings` by default.
  Returns:
    float32 arrays that share no memory with `params`.
  """
  length = config.max_position_embeddings if max_length is None else max_length
  params = lora.merge_lora(params) if lora.has_lora(params) else params
  params = unstack_layers(config, params) if is_stacked(params) else params
  params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  embedding = params["embed_tokens"]["embedding"]
  head = embedding.T if config.tie_word_embeddings else params["lm_head"]["kernel"]
  cos, sin = rope_angles(jnp.arange(length)[None], config.head_dim, config.rope_theta)
  layers = []
  for i in range(config.num_hidden_layers):
    layer = params[f"layers_{i}"]
    scales = [_padded(layer[name]["scale"], LANES) for name in ("input_norm", "post_norm")]
    layers.append((scales[0], *_attention(layer["attn"]), scales[1], *_mlp(layer["mlp"])))
  packed = Packed(
    embedding=_padded(embedding, LANES),
    rope=jnp.concatenate([cos, sin], axis=-1)[0, :, 0],
    norm=_padded(params["norm"]["scale"], LANES),
    head=_panels(head),
    layers=tuple(layers),
  )
  # A jitted function hands an argument that it returns through: whoever donates `params` later
  # would delete it.
  return jax.tree.map(jnp.copy, packed)
