"""Adapters in and out in the format of Hugging Face's PEFT.

That is a directory of `adapter_config.json` and `adapter_model.safetensors`. PEFT's A is
[r, inputs] and its B [outputs, r], kernels transposed. Attention, the head and the MLP of dense
models are modules there, named by `target_modules`. The experts of a layer are two parameters of
one module, named by `target_parameters` (PEFT >= 0.17, transformers >= 5): A is [E * r, inputs],
B is [outputs, r * E], and where both are adapted the wrapper of down_proj holds that of
gate_up_proj under `base_layer`.

What PEFT cannot say: adapters of gate_proj, up_proj or down_proj of the dense layers of a model
that also has experts. It takes these names for the experts' (the modules of transformers 4).
"""

import json
import os
import pathlib
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from rome.models import lora
from rome.models.config import ModelConfig

# Settings of PEFT that change what an adapter computes, with the values under which it is what
# `rome.models.lora` computes.
_PLAIN: dict[str, tuple] = {
  "alora_invocation_tokens": (None,),
  "alpha_pattern": ({}, None),
  "bias": ("none",),
  "fan_in_fan_out": (False,),
  "layer_replication": (None,),
  "lora_bias": (False,),
  "modules_to_save": (None, []),
  "peft_type": ("LORA",),
  "rank_pattern": ({}, None),
  "trainable_token_indices": (None,),
  "use_bdlora": (None,),
  "use_dora": (False,),
  "use_qalora": (False,),
  "use_rslora": (False,),
}


def export(
  path: str | os.PathLike, config: ModelConfig, params: dict, base_model: str | None = None
) -> None:
  """Writes the adapters of `params` into the directory `path`, made if missing.

  Args:
    path: the directory.
    config: the model's sizes.
    params: with adapters, stacked or not.
    base_model: what PEFT shall load under them, a name or a directory; None leaves it open.
  Raises:
    ValueError: there are no adapters, their ranks or alphas differ, or PEFT has no name for one.
  """
  if not lora.has_lora(params):
    raise ValueError("the parameters have no lora adapters to export")
  tensors: dict[str, np.ndarray] = {}
  scales, targets = set(), lora.targets_of(config, params)
  _check_names(config, targets)
  for name in targets:
    for layer, a, b, alpha in lora.adapters_of(config, params, name):
      name_a, name_b = _names(name, layer, targets)
      tensors[name_a], tensors[name_b] = _to_peft(lora.TARGETS[name], np.asarray(a), np.asarray(b))
      scales.add((a.shape[-1], float(alpha)))
  if len(scales) > 1:
    raise ValueError(f"adapters differ in (rank, alpha), which is not exported: {sorted(scales)}")
  rank, alpha = scales.pop()
  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
  settings = {
    "base_model_name_or_path": base_model,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
    "lora_dropout": 0.0,
    "peft_type": "LORA",
    "r": rank,
    "target_modules": [t for t in targets if not lora.TARGETS[t].of_experts],
    "target_parameters": [f"mlp.{t}" for t in targets if lora.TARGETS[t].of_experts] or None,
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
  }
  (path / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load_adapter(path: str | os.PathLike, config: ModelConfig, params: dict) -> dict:
  """`params` with the adapters that PEFT, or `export`, wrote into the directory `path`.

  Args:
    path: the directory.
    config: the model's sizes.
    params: without adapters, stacked or not.
  Raises:
    ValueError: a file is missing or damaged, a setting asks for more than plain LoRA, a target is
      not of this model, or a tensor is unknown, missing, of the wrong shape or not finite; the
      message names it.
  """
  path = pathlib.Path(path)
  try:
    settings = json.loads((path / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(path / "adapter_model.safetensors")
  except (OSError, TypeError, ValueError, SafetensorError) as e:
    raise ValueError(f"no usable adapter in {path}: {e}") from None
  targets, rank, alpha = _read_settings(path, settings)
  # PEFT adds a copy of the frozen head where the head is adapted.
  tensors.pop("base_model.model.lm_head.base_layer.weight", None)

  def take(name: str, want: tuple[int, ...]) -> np.ndarray:
    if name not in tensors:
      raise ValueError(f"{path}: missing tensor {name}")
    found = tensors.pop(name)
    if found.shape != want:
      raise ValueError(f"{path}: {name} has shape {found.shape}, the model and r={rank} ask {want}")
    if not np.isfinite(found.astype(np.float32)).all():
      raise ValueError(f"{path}: {name} has NaN or infinite values")
    return found.astype(np.float32)

  def read(target: str, layer: int, kernel: tuple[int, ...]) -> tuple[chex.Array, chex.Array]:
    shapes = lora.shapes(lora.TARGETS[target], kernel, rank)
    want = [x.shape for x in _to_peft(lora.TARGETS[target], *map(np.empty, shapes))]
    a, b = (take(*x) for x in zip(_names(target, layer, targets), want, strict=True))
    a, b = _from_peft(lora.TARGETS[target], a, b, shapes)
    return jnp.asarray(a), jnp.asarray(b)

  out = lora.attach(config, params, alpha, targets, read)
  if tensors:
    raise ValueError(f"{path}: unknown tensor {min(tensors)}")
  return out


def _read_settings(path: pathlib.Path, settings: dict[str, Any]) -> tuple[list[str], int, float]:
  """(targets, rank, alpha) of an `adapter_config.json`."""
  for name, allowed in _PLAIN.items():
    if name in settings and settings[name] not in allowed:
      raise ValueError(f"{path}: {name}={settings[name]!r} is not plain LoRA and not read here")
  modules, parameters = (settings.get(f"target_{kind}") or [] for kind in ("modules", "parameters"))
  if isinstance(modules, str):
    raise ValueError(f"{path}: target_modules={modules!r} is a pattern; only lists are read here")
  last = [[name.rpartition(".")[2] for name in names] for names in (modules, parameters)]
  targets = sorted({*last[0], *(f"experts.{name}" for name in last[1])})
  rank, alpha = settings.get("r"), settings.get("lora_alpha")
  if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
    raise ValueError(f"{path}: r={rank!r} and lora_alpha={alpha!r} must be positive numbers")
  return targets, rank, float(alpha)


def _check_names(config: ModelConfig, targets: list[str]) -> None:
  dense = [name for name in targets if lora.TARGETS[name].layers == "dense"]
  if dense and any(config.is_sparse(i) for i in range(config.num_hidden_layers)):
    raise ValueError(
      f"PEFT has no name for {', '.join(dense)} of dense layers in a model with experts: "
      "merge_lora the adapters instead, or train without these targets"
    )


def _names(target: str, layer: int, targets: list[str]) -> tuple[str, str]:
  """PEFT's names of A and B."""
  if target == "lm_head":
    stem = "base_model.model.lm_head"
  elif lora.TARGETS[target].of_experts:
    nested = target == "experts.gate_up_proj" and "experts.down_proj" in targets
    stem = f"base_model.model.model.layers.{layer}.mlp.experts{'.base_layer' if nested else ''}"
  else:
    block = "self_attn" if lora.TARGETS[target].path[0] == "attn" else "mlp"
    stem = f"base_model.model.model.layers.{layer}.{block}.{target}"
  return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _to_peft(target: lora.Target, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  rank = a.shape[-1]
  if target.of_experts:  # [E, D, r] -> [(E r), D] and [E, r, O] -> [O, (r E)]
    a = a.transpose(0, 2, 1).reshape(-1, a.shape[1])
    b = b.transpose(2, 1, 0).reshape(b.shape[2], -1)
  else:
    a, b = a.reshape(-1, rank).T, b.reshape(rank, -1).T
  return np.ascontiguousarray(a), np.ascontiguousarray(b)


def _from_peft(
  target: lora.Target, a: np.ndarray, b: np.ndarray, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray]:
  """The inverse of `_to_peft`, for arrays of these shapes."""
  if target.of_experts:
    experts, _, rank = shapes[0]
    a = a.reshape(experts, rank, -1).transpose(0, 2, 1)
    return a, b.reshape(-1, rank, experts).transpose(2, 1, 0)
  return a.T.reshape(shapes[0]), b.T.reshape(shapes[1])
