"""GGUF in: llama, qwen3 and qwen3moe files with F32, F16, Q8_0 and Q4_1 tensors, read strictly.

Quantised tensors become floats, bit for bit as ggml's own reference has them. Left out: other
quantisations, RoPE scaling, writing. The tokenizer in the file is `rome.text.Tokenizer`'s.
"""

import math
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rome.models.config import ModelConfig
from rome.models.decoder import init_params
from rome.text.gguf_file import GGUF, Tensor, read_gguf

# General settings of an architecture that this reader knows; any other one stops it.
_KEYS = {
  *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
  *("attention.value_length", "attention.layer_norm_rms_epsilon", "block_count"),
  *("context_length", "embedding_length", "expert_count", "expert_feed_forward_length"),
  *("expert_used_count", "feed_forward_length", "rope.dimension_count", "rope.freq_base"),
  "vocab_size",
}
_ARCHITECTURES = ("llama", "qwen3", "qwen3moe")


def _f32(raw: np.ndarray) -> np.ndarray:
  return raw.view("<f4")


def _f16(raw: np.ndarray) -> np.ndarray:
  return raw.view("<f2").astype(np.float32)


def _q8_0(raw: np.ndarray) -> np.ndarray:
  """Blocks of 32: a half scale, 32 int8."""
  blocks = raw.reshape(-1, 34)
  return _f16(blocks[:, :2].copy()) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_1(raw: np.ndarray) -> np.ndarray:
  """Blocks of 32: a half scale, a half minimum, 16 bytes whose low nibbles come first."""
  blocks = raw.reshape(-1, 20)
  scale, least = _f16(blocks[:, :2].copy()), _f16(blocks[:, 2:4].copy())
  nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
  return scale * nibbles.astype(np.float32) + least


# Number of a type in ggml -> values a block, bytes a block, how to read it.
_KINDS: dict[int, tuple[int, int, Callable[[np.ndarray], np.ndarray]]] = {
  0: (1, 4, _f32),
  1: (1, 2, _f16),
  3: (32, 20, _q4_1),
  8: (32, 34, _q8_0),
}


def dequantize(name: str, tensor: Tensor, data: mmap.mmap | bytes) -> np.ndarray:
  """Values of a tensor, float32, of its shape.

  Args:
    name: what errors call it.
    tensor: where it lies in `data`.
    data: the bytes of the whole file.
  Raises:
    ValueError: the type is not supported, the bytes end too early, or a value is not finite.
  """
  if tensor.kind not in _KINDS:
    raise ValueError(
      f"{name}: quantisation {tensor.kind} (a ggml type) is not supported; convert the file to "
      "F32, F16, Q8_0 or Q4_1"
    )
  values, size, read = _KINDS[tensor.kind]
  if not tensor.shape or tensor.shape[-1] % values:
    raise ValueError(f"{name}: shape {tensor.shape} is not whole blocks of {values}")
  count = math.prod(tensor.shape) // values * size
  end = tensor.offset + count
  if end > len(data):
    raise ValueError(f"truncated: {name} ends at byte {end}, the file at {len(data)}")
  raw = np.frombuffer(data[tensor.offset : end], np.uint8)
  out = read(raw).reshape(tensor.shape)
  if not np.isfinite(out).all():
    raise ValueError(f"{name} has NaN or infinite values")
  return out


def _number(x: float) -> float:
  """The shortest decimal that is the same float32: files hold 1e-5 as 9.99999974e-06."""
  return float(str(np.float32(x)))


class _Settings:
  """The settings of a file's architecture, each of a known name."""

  def __init__(self, metadata: dict[str, Any]):
    self.arch = metadata.get("general.architecture")
    if self.arch not in _ARCHITECTURES:
      raise ValueError(
        f"architecture {self.arch!r} is not supported; these are: {', '.join(_ARCHITECTURES)}"
      )
    prefix = f"{self.arch}."
    self.found = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    for key in sorted(self.found.keys() - _KEYS):
      raise ValueError(f"unknown setting {self.arch}.{key} = {str(self.found[key])[:60]}")

  def get(self, key: str, default: Any = None, kind: type = int) -> Any:
    value = self.found.get(key, default)
    if value is None:
      raise ValueError(f"missing setting {self.arch}.{key}")
    if type(value) is not kind:
      raise ValueError(f"{self.arch}.{key} must be {kind.__name__}, got {str(value)[:60]}")
    return value

  def must_be(self, key: str, want: int) -> None:
    if self.get(key, want) != want:
      raise ValueError(
        f"{self.arch}.{key} = {self.get(key)} is not supported: other settings ask {want}"
      )


def gguf_config(file: GGUF) -> ModelConfig:
  """The sizes that the metadata of `file` states.

  Raises:
    ValueError: the architecture or one of its settings is unknown, missing or contradictory.
  """
  settings = _Settings(file.metadata)
  arch, get = settings.arch, settings.get
  if "token_embd.weight" not in file.tensors:
    raise ValueError("missing tensor token_embd.weight")
  # Counts are whatever the file says: nothing may loop over more layers than it has tensors for.
  if not 1 <= get("block_count") <= len(file.tensors):
    raise ValueError(f"{arch}.block_count = {get('block_count')}, but {len(file.tensors)} tensors")
  heads, experts = get("attention.head_count"), get("expert_count", 0)
  if (arch == "qwen3moe") != (experts != 0):
    raise ValueError(f"{arch}.expert_count = {experts} is not supported")
  config = ModelConfig(
    vocab_size=file.tensors["token_embd.weight"].shape[0],
    hidden_size=get("embedding_length"),
    num_hidden_layers=get("block_count"),
    num_attention_heads=heads,
    num_key_value_heads=get("attention.head_count_kv", heads),
    head_dim=get("attention.key_length", get("embedding_length") // max(heads, 1)),
    num_experts=experts,
    num_experts_per_tok=get("expert_used_count") if experts else 0,
    moe_intermediate_size=get("expert_feed_forward_length") if experts else 0,
    intermediate_size=get("feed_forward_length", 0),
    norm_topk_prob=True,  # ggml's qwen3moe always scales them; the file has no key for it
    qk_norm=arch != "llama",
    attention_bias="blk.0.attn_q.bias" in file.tensors,
    rope_theta=_number(get("rope.freq_base", 10_000.0, float)),
    rms_norm_eps=_number(get("attention.layer_norm_rms_epsilon", None, float)),
    tie_word_embeddings="output.weight" not in file.tensors,
    max_position_embeddings=get("context_length"),
  )
  settings.must_be("rope.dimension_count", config.head_dim)
  settings.must_be("attention.value_length", config.head_dim)
  settings.must_be("vocab_size", config.vocab_size)
  return config


_NAMES = {
  ("embed_tokens", "embedding"): "token_embd.weight",
  ("norm", "scale"): "output_norm.weight",
  ("lm_head", "kernel"): "output.weight",
}
_LAYER_NAMES = {
  ("input_norm", "scale"): ["attn_norm.weight"],
  ("post_norm", "scale"): ["ffn_norm.weight"],
  ("attn", "q_norm", "scale"): ["attn_q_norm.weight"],
  ("attn", "k_norm", "scale"): ["attn_k_norm.weight"],
  ("mlp", "router"): ["ffn_gate_inp.weight"],
  ("mlp", "gate_up_proj"): ["ffn_gate_exps.weight", "ffn_up_exps.weight"],
  ("mlp", "down_proj"): ["ffn_down_exps.weight"],
}
for _name in ("gate", "up", "down"):
  _LAYER_NAMES[("mlp", f"{_name}_proj", "kernel")] = [f"ffn_{_name}.weight"]
for _ours, _theirs in {"q": "q", "k": "k", "v": "v", "o": "output"}.items():
  _LAYER_NAMES[("attn", f"{_ours}_proj", "kernel")] = [f"attn_{_theirs}.weight"]
  _LAYER_NAMES[("attn", f"{_ours}_proj", "bias")] = [f"attn_{_theirs}.bias"]


def _sources(path: tuple[str, ...]) -> list[str]:
  """The tensors of a file that make up the parameter at `path`."""
  if path in _NAMES:
    return [_NAMES[path]]
  layer = path[0].removeprefix("layers_")
  return [f"blk.{layer}.{name}" for name in _LAYER_NAMES[path[1:]]]


def _source_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape that each source of a parameter has: output axis before the input axis, heads joined."""
  if path[-1] == "scale" or path[-1] == "embedding":
    return shape
  if path[-1] == "bias":
    return (math.prod(shape),)
  if path[-1] == "gate_up_proj":
    return (shape[0], shape[2] // 2, shape[1])
  if path[-1] == "down_proj":  # of experts; that of a dense layer ends in "kernel"
    return (shape[0], shape[2], shape[1])
  inputs = math.prod(shape[:-1]) if path[-2] == "o_proj" else shape[0]
  return (math.prod(shape) // inputs, inputs)


def _split_halves(x: np.ndarray, heads: int) -> np.ndarray:
  """Rows of q or k in this package's order: llama files interleave the two halves of RoPE."""
  return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _convert(
  path: tuple[str, ...], shape: tuple[int, ...], parts: list[np.ndarray], interleaved: bool
) -> np.ndarray:
  """The parameter at `path` from its sources."""
  x = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
  if path[-1] in ("scale", "embedding"):
    return x
  if interleaved and path[-2] in ("q_proj", "k_proj"):
    x = _split_halves(x, shape[-2])  # shape is [D, heads, H], of a bias [heads, H]
  if path[-1] == "bias":
    return x.reshape(shape)
  return np.ascontiguousarray(x.swapaxes(-1, -2)).reshape(shape)


def _parameters(
  file: GGUF, config: ModelConfig, data: mmap.mmap, dtype: str
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
  want = traverse_util.flatten_dict(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
  sources = {path: _sources(path) for path in want}
  known = {name for names in sources.values() for name in names}
  for name in sorted(known ^ file.tensors.keys()):
    raise ValueError(f"{'missing' if name in known else 'unknown'} tensor {name}")
  interleaved = file.metadata["general.architecture"] == "llama"
  for path, names in sources.items():
    shape = _source_shape(path, want[path].shape)
    for name in names:
      if file.tensors[name].shape != shape:
        raise ValueError(f"{name} has shape {file.tensors[name].shape}, the settings ask {shape}")
    parts = [dequantize(name, file.tensors[name], data) for name in names]
    with np.errstate(over="ignore"):
      x = _convert(path, want[path].shape, parts, interleaved).astype(jnp.dtype(dtype), copy=False)
    if not np.isfinite(x).all():
      raise ValueError(f"{names[0]} has values too large for {dtype}")
    yield path, x


def load_gguf(path: str | os.PathLike, dtype: str = "float32") -> tuple[ModelConfig, dict]:
  """Reads a GGUF file.

  Args:
    path: the file.
    dtype: what the parameters are rounded to.
  Returns:
    The sizes, and the parameters as `init_params` gives them, layers not stacked.
  Raises:
    ValueError: the file is missing, damaged or of an unsupported kind, or a tensor is unknown,
      missing, of the wrong shape or type, or not finite; the message names it.
  """
  file = read_gguf(path)
  try:
    config = gguf_config(file)
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
      flat = {k: jnp.asarray(v) for k, v in _parameters(file, config, data, dtype)}
  except (IndexError, OSError, TypeError, ValueError) as e:
    raise ValueError(f"{path}: {e}") from None
  return config, traverse_util.unflatten_dict(flat)
