"""Weights in and out: a directory of `config.json` and `model.safetensors`, read strictly.

Hugging Face names, sharded files and GGUF are not here yet.
"""

import dataclasses
import json
import os
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util
from safetensors import SafetensorError

from rome.models.config import ModelConfig
from rome.models.decoder import init_params


def save(path: str | os.PathLike, config: ModelConfig, params: chex.ArrayTree) -> None:
  """Writes `params` and `config` into the directory `path`, made if missing.

  Args:
    path: the directory.
    config: the model's sizes.
    params: a nested dict of arrays.
  """
  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  flat = traverse_util.flatten_dict(params, sep=".")
  safetensors.numpy.save_file(
    {k: np.asarray(v) for k, v in flat.items()}, path / "model.safetensors"
  )
  (path / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load(path: str | os.PathLike) -> tuple[ModelConfig, dict]:
  """Reads what `save` wrote.

  Raises:
    ValueError: a file is missing or damaged, or a tensor is unknown, missing, of the wrong shape or
      type, or not finite; the message names it.
  """
  path = pathlib.Path(path)
  try:
    config = ModelConfig(**json.loads((path / "config.json").read_text()))
    flat = safetensors.numpy.load_file(path / "model.safetensors")
  except (OSError, TypeError, ValueError, SafetensorError) as e:
    raise ValueError(f"no usable model in {path}: {e}") from None
  want = traverse_util.flatten_dict(
    jax.eval_shape(lambda: init_params(config, jax.random.key(0))), sep="."
  )
  for name in sorted(want.keys() | flat.keys()):
    if name not in want or name not in flat:
      raise ValueError(f"{path}: {'unknown' if name not in want else 'missing'} tensor {name}")
    if flat[name].shape != want[name].shape:
      raise ValueError(
        f"{path}: {name} has shape {flat[name].shape}, config.json asks {want[name].shape}"
      )
    if flat[name].dtype != want[name].dtype:
      raise ValueError(f"{path}: {name} has type {flat[name].dtype}, want {want[name].dtype}")
    if not np.isfinite(flat[name]).all():
      raise ValueError(f"{path}: {name} has NaN or infinite values")
  return config, traverse_util.unflatten_dict({k: jnp.asarray(v) for k, v in flat.items()}, sep=".")
