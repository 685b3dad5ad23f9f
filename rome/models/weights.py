"""Weights in and out: a Hugging Face directory, read strictly and by slices.

One format: `config.json` and `model.safetensors`, or shards of it with an index; names and layout
are those of transformers (`rome.models.hf_names`), so what is saved here loads there. A GGUF file
is read too (`rome.models.gguf`), whole.

With a mesh, each device's slice of each array is read by itself and put on that device before the
next is read: no host ever holds an array whole, let alone the model.

Left out: PyTorch's pickles, quantised weights, adapters (merge them first).
"""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from rome.models import hf_config, sharding
from rome.models.config import ModelConfig
from rome.models.gguf import gguf_config, load_gguf
from rome.models.hf_files import CONFIG, INDEX, SINGLE, Tensor, Writer, open_tensors, read_json
from rome.models.hf_names import Index, Leaf, Path, leaves
from rome.models.layout import is_stacked, stack_layers
from rome.text.gguf_file import read_gguf

DTYPES = ("float32", "bfloat16", "float16")
_ON_DISK = ("F32", "BF16", "F16")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_CHUNK = 1 << 26  # bytes compared at once


def load(
  path: str | os.PathLike,
  mesh: jax.sharding.Mesh | None = None,
  dtype: str = "float32",
  stacked: bool = False,
) -> tuple[ModelConfig, dict]:
  """Reads a model.

  Args:
    path: the directory, or a file that ends in `.gguf`.
    mesh: where the parameters go, laid out by `rome.models.sharding.param_shardings`; None is the
      default device.
    dtype: of the parameters; tensors of type F32, BF16 and F16 are cast to it.
    stacked: whether like neighbours among the layers are one array (`stack_layers`).
  Returns:
    The model's sizes and its parameters, as `init_params` gives them.
  Raises:
    ValueError: a file is missing or damaged, config.json asks for something not implemented, or a
      tensor is unknown, missing, in two files, of the wrong shape or type, or not finite (in
      `dtype`); the message names it. All but the last is found before any tensor is read.
  """
  if dtype not in DTYPES:
    raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
  path = pathlib.Path(path)
  if path.suffix == ".gguf":
    return _load_gguf(path, mesh, dtype, stacked)
  config = read_config(path)
  tensors = open_tensors(path)
  _check(path, config, tensors)
  found = leaves(config, stacked)
  shapes = {k: jax.ShapeDtypeStruct(leaf.shape, dtype) for k, leaf in found.items()}
  placed: dict[Path, jax.sharding.Sharding | None] = dict.fromkeys(found)
  if mesh is not None:
    tree = sharding.param_shardings(mesh, traverse_util.unflatten_dict(shapes))
    placed = traverse_util.flatten_dict(tree)
  params = {k: _place(path, leaf, tensors, dtype, placed[k]) for k, leaf in found.items()}
  return config, traverse_util.unflatten_dict(params)


def _load_gguf(
  path: pathlib.Path, mesh: jax.sharding.Mesh | None, dtype: str, stacked: bool
) -> tuple[ModelConfig, dict]:
  config, params = load_gguf(path, dtype)
  params = stack_layers(config, params) if stacked else params
  if mesh is not None:
    params = jax.device_put(params, sharding.param_shardings(mesh, params))
  return config, params


def read_config(path: str | os.PathLike) -> ModelConfig:
  """The sizes of the model in a directory or .gguf file. Raises ValueError as `load` does."""
  if pathlib.Path(path).suffix == ".gguf":
    return gguf_config(read_gguf(path))
  file = pathlib.Path(path) / CONFIG
  raw = read_json(file)
  try:
    return hf_config.from_dict(raw)
  except ValueError as e:
    raise ValueError(f"{file}: {e}") from None


def _check(path: pathlib.Path, config: ModelConfig, tensors: dict[str, Tensor]) -> None:
  """Compares what is there with what config.json asks for."""
  for count in ("num_hidden_layers", "num_experts"):  # leaves() loops over them
    if getattr(config, count) > len(tensors):
      raise ValueError(
        f"{path}: config.json says {count}={getattr(config, count)}, but the files hold "
        f"{len(tensors)} tensors"
      )
  wanted = {name: leaf for leaf in leaves(config, False).values() for name in leaf.names.flat}
  have = dict(tensors)
  if config.tie_word_embeddings and _HEAD in have and _EMBEDDING in have:
    _check_tied(path, have.pop(_HEAD), have[_EMBEDDING])
  for name in sorted(wanted.keys() | have.keys()):
    if name not in wanted or name not in have:
      raise ValueError(f"{path}: {'unknown' if name not in wanted else 'missing'} tensor {name}")
    tensor, shape = have[name], wanted[name].disk_shape
    if tensor.shape != shape:
      raise ValueError(f"{path}: {name} has shape {tensor.shape}, config.json asks for {shape}")
    if tensor.dtype not in _ON_DISK:
      raise ValueError(f"{path}: {name} has type {tensor.dtype}, want one of {', '.join(_ON_DISK)}")


def _check_tied(path: pathlib.Path, head: Tensor, embedding: Tensor) -> None:
  """Some tied models have the head on disk too: fine where it is the embedding."""
  same = head.shape == embedding.shape and head.dtype == embedding.dtype and len(head.shape) == 2
  if same:
    step = max(1, _CHUNK // (4 * max(1, head.shape[1])))
    for i in range(0, head.shape[0], step):
      index = (slice(i, min(i + step, head.shape[0])), slice(0, head.shape[1]))
      same = same and np.array_equal(head.read(index), embedding.read(index))
  if not same:
    raise ValueError(
      f"{path}: {_HEAD} is not {_EMBEDDING}, but config.json says tie_word_embeddings"
    )


def _place(
  path: pathlib.Path,
  leaf: Leaf,
  tensors: dict[str, Tensor],
  dtype: str,
  where: jax.sharding.Sharding | None,
) -> jax.Array:
  """One array on its devices."""

  def fetch(name: str, index: Index) -> np.ndarray:
    x = tensors[name].read(index)
    # Of the type asked for: a large number may be infinite there.
    with np.errstate(over="ignore"):
      x = x.astype(jnp.dtype(dtype), copy=False)
    if not np.isfinite(x).all():
      raise ValueError(f"{path}: {name} has NaN or infinite values (as {dtype})")
    return x

  whole = tuple(slice(0, n) for n in leaf.shape)
  if where is None:
    return jnp.asarray(leaf.read(whole, fetch, jnp.dtype(dtype)))
  # Each distinct slice is read once, for all devices that hold it.
  devices: dict[tuple, list] = {}
  for device, index in where.addressable_devices_indices_map(leaf.shape).items():
    bounds = tuple(i.indices(n)[:2] for i, n in zip(index or whole, leaf.shape, strict=True))
    devices.setdefault(bounds, []).append(device)
  arrays = []
  for bounds, holders in devices.items():
    x = leaf.read(tuple(slice(*b) for b in bounds), fetch, jnp.dtype(dtype))
    arrays += [jax.device_put(x, device) for device in holders]
  return jax.make_array_from_single_device_arrays(leaf.shape, where, arrays)


def save(
  path: str | os.PathLike,
  config: ModelConfig,
  params: chex.ArrayTree,
  shard_bytes: int = 5_000_000_000,
  token_ids: Mapping[str, Any] | None = None,
) -> None:
  """Writes a model, one array at a time, so that transformers and `load` read it.

  Arrays that are spread over processes are gathered, so all of them call this; the first writes.

  A model that is there already is replaced at the end; killed before, it stays as it was (in
  `.replaced` under `path`, if between two renames). Other files in `path` are left alone.

  Args:
    path: the directory, made if missing.
    config: the model's sizes.
    params: as `init_params` gives, stacked or not; float32, bfloat16 or float16.
    shard_bytes: files hold no more than this, but at least one tensor.
    token_ids: `bos_token_id`, `eos_token_id` and `pad_token_id` for config.json, which `load` does
      not read; none where missing.
  Raises:
    ValueError: `params` are not those of `config`, or not finite.
  """
  path, params = pathlib.Path(path), traverse_util.flatten_dict(params)
  found = leaves(config, is_stacked(traverse_util.unflatten_dict(params)))
  _check_params(config, found, params)
  content = hf_config.to_dict(config, str(params["embed_tokens", "embedding"].dtype))
  content |= dict(token_ids or {})
  shards, stream = _plan(found, params, shard_bytes), _tensors(found, params)
  spread = any(not getattr(x, "is_fully_addressable", True) for x in params.values())
  if spread and jax.process_index():
    for _ in stream:  # each tensor is gathered by all
      pass
  else:
    _write(path, content, shards, stream)
  if spread:
    multihost_utils.sync_global_devices(f"saved {path}")


def _write(
  path: pathlib.Path,
  content: dict[str, Any],
  shards: list[dict[str, int]],
  stream: Iterator[tuple[str, np.ndarray]],
) -> None:
  names = [SINGLE]
  if len(shards) > 1:
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
  with Writer(path) as writer:
    writer.json(CONFIG, content)
    for name, sizes in zip(names, shards, strict=True):
      writer.tensors(name, dict(next(stream) for _ in sizes))
    if len(shards) > 1:
      total = sum(sum(sizes.values()) for sizes in shards)
      where = {tensor: name for name, sizes in zip(names, shards, strict=True) for tensor in sizes}
      writer.json(INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _check_params(config: ModelConfig, found: dict[Path, Leaf], params: dict) -> None:
  for key in sorted(found.keys() | params.keys()):
    name = ".".join(key)
    if key not in found or key not in params:
      mend = ": merge adapters first" if "lora_" in name else ""
      kind = "missing" if key in found else "unknown"
      raise ValueError(f"{kind} parameter {name}{mend}")
    x = params[key]
    if x.shape != found[key].shape:
      raise ValueError(f"parameter {name} has shape {x.shape}, want {found[key].shape}")
    if str(x.dtype) not in DTYPES:
      raise ValueError(f"parameter {name} has type {x.dtype}, want one of {', '.join(DTYPES)}")


def _plan(found: dict[Path, Leaf], params: dict, shard_bytes: int) -> list[dict[str, int]]:
  """Which tensors lie in which file, with their bytes, in the order of `_tensors`."""
  shards: list[dict[str, int]] = [{}]
  room = shard_bytes
  for key, leaf in found.items():
    size = int(np.prod(leaf.core)) * params[key].dtype.itemsize
    for name in leaf.names.flat:
      if size > room and shards[-1]:
        shards.append({})
        room = shard_bytes
      shards[-1][name] = size
      room -= size
  return shards


def _tensors(found: dict[Path, Leaf], params: dict) -> Iterator[tuple[str, np.ndarray]]:
  """Every tensor on disk in order; one layer of one array is on the host at a time."""
  for key, leaf in found.items():
    for front in np.ndindex(leaf.names.shape[:-1][:1]):
      x = params[key][front] if front else params[key]
      if not getattr(x, "is_fully_addressable", True):
        x = multihost_utils.process_allgather(x, tiled=True)
      array = np.asarray(x)
      for name, tensor in leaf.tensors(array, front):
        if not np.isfinite(tensor).all():
          raise ValueError(f"parameter {'.'.join(key)} has NaN or infinite values ({name})")
        yield name, tensor
