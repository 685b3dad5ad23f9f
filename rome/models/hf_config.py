"""`ModelConfig` to and from Hugging Face's `config.json`: model types qwen3_moe, qwen3 and llama.

Keys of transformers 4 and 5 are read alike. A missing key means what transformers takes it for; a
size must be there.

Left out, and refused by name where a file asks for them: RoPE other than the default (scaled,
partial, interleaved, a kind for each sort of layer), sliding windows, activations other than SiLU,
biases in the MLP, dropout, quantised weights. A key of no consequence for the function (token ids,
caches, initialisation, how a loss is reported) is passed over; a key that is known to nobody here
is named in a warning, once.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from rome.models.config import ModelConfig

ARCHITECTURES = {
  "qwen3_moe": "Qwen3MoeForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "llama": "LlamaForCausalLM",
}

# Of no consequence for the model, but for those who generate with it.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Our name is theirs. The first are in every file; of the second transformers has a default.
_SIZES = (
  "vocab_size",
  "hidden_size",
  "num_hidden_layers",
  "num_attention_heads",
  "max_position_embeddings",
)
_DEFAULTS: dict[str, Any] = {
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "attention_bias": False,
}
_EXPERT_SIZES = ("num_experts_per_tok", "moe_intermediate_size")
_EXPERT_DEFAULTS: dict[str, Any] = {
  "decoder_sparse_step": 1,
  "mlp_only_layers": (),
  "norm_topk_prob": False,
}

# Keys that change the function: the values under which it is the one computed here.
_MUST_BE: dict[str, tuple] = {
  "hidden_act": ("silu",),
  "mlp_bias": (False,),
  "attention_dropout": (0,),
  "use_sliding_window": (False,),
  "partial_rotary_factor": (1,),
  "rope_interleaved": (False,),
  "quantization_config": (),
}

_READ = {
  *_SIZES, *_DEFAULTS, *_EXPERT_SIZES, *_EXPERT_DEFAULTS, *_MUST_BE, "model_type", "head_dim",
  "num_key_value_heads", "intermediate_size", "num_experts", "num_local_experts", "layer_types",
  "rope_theta", "rope_scaling", "rope_parameters", "query_norm_init",
}  # fmt: skip
_IGNORED = {
  *TOKEN_IDS, "_attn_implementation", "_attn_implementation_autoset", "_name_or_path",
  "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "id2label",
  "initializer_range", "is_encoder_decoder", "is_llama_config", "label2id", "max_window_layers",
  "output_attentions", "output_hidden_states", "output_router_logits", "pretraining_tp",
  "problem_type", "return_dict", "router_aux_loss_coef", "sliding_window", "tokenizer_class",
  "torch_dtype", "transformers.js_config", "transformers_version", "use_cache",
}  # fmt: skip
# Choice: a count beyond this is a damaged file, and nothing may loop over it.
_MOST = 10_000
_warned: set[str] = set()


def from_dict(raw: Mapping[str, Any]) -> ModelConfig:
  """The model that the content of a `config.json` describes.

  Args:
    raw: the parsed file. `query_norm_init` is a key of this project, which `to_dict` writes.
  Raises:
    ValueError: another model type, a missing key, a value out of range, or a key that asks for
      something not implemented; the message names it.
  """
  if not isinstance(raw, Mapping):
    raise ValueError(f"config.json must hold an object, got {type(raw).__name__}")
  model_type = raw.get("model_type")
  if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
    known = ", ".join(ARCHITECTURES)
    raise ValueError(f"model_type must be one of {known}, got {model_type!r}")
  _refuse(raw)
  kwargs = {name: _required(raw, name) for name in _SIZES}
  kwargs |= {name: _get(raw, name, default) for name, default in _DEFAULTS.items()}
  heads, kv = kwargs["num_attention_heads"], raw.get("num_key_value_heads")
  kwargs["num_key_value_heads"] = heads if kv is None else kv
  kwargs["head_dim"] = _head_dim(raw, model_type)
  kwargs["rope_theta"] = _rope_theta(raw)
  kwargs["qk_norm"] = model_type != "llama"
  kwargs["query_norm_init"] = raw.get("query_norm_init", 1.0)
  if model_type == "qwen3_moe":
    kwargs |= {name: _required(raw, name) for name in _EXPERT_SIZES}
    kwargs |= {name: _get(raw, name, default) for name, default in _EXPERT_DEFAULTS.items()}
    kwargs["num_experts"] = _num_experts(raw)
    kwargs["intermediate_size"] = raw.get("intermediate_size", 0)
  else:
    kwargs["intermediate_size"] = _required(raw, "intermediate_size")
  for name in ("num_hidden_layers", "num_experts"):
    if isinstance(kwargs.get(name), int) and kwargs[name] > _MOST:
      raise ValueError(f"{name} is {kwargs[name]}, want at most {_MOST}")
  if not isinstance(kwargs.get("mlp_only_layers", ()), list | tuple):
    raise ValueError(f"mlp_only_layers must be a list, got {kwargs['mlp_only_layers']!r}")
  config = ModelConfig(**kwargs)
  _warn_of_unknown(raw)
  return config


def to_dict(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
  """The content of a `config.json` which transformers 4 and 5 and `from_dict` read.

  Fields that mean nothing to a model without experts are not written, so they come back as their
  defaults.

  Args:
    config: the model.
    dtype: of the tensors beside it.
  Raises:
    ValueError: no model type of transformers is this model.
  """
  model_type = "qwen3_moe" if config.num_experts else "qwen3" if config.qk_norm else "llama"
  if config.num_experts and not config.qk_norm:
    raise ValueError("no Hugging Face model type has experts without qk_norm: cannot write it")
  names = [*_SIZES, *_DEFAULTS, "num_key_value_heads", "head_dim", "intermediate_size"]
  if config.num_experts:
    names += [*_EXPERT_SIZES, *_EXPERT_DEFAULTS, "num_experts"]
  if config.query_norm_init != 1:
    names.append("query_norm_init")
  sizes = {name: getattr(config, name) for name in names}
  if config.num_experts:
    sizes["mlp_only_layers"] = list(config.mlp_only_layers)
  # transformers 5 reads rope_theta and torch_dtype of version 4; not so the other way round.
  return {
    "architectures": [ARCHITECTURES[model_type]],
    "model_type": model_type,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    **dict.fromkeys(TOKEN_IDS),  # missing ones are 1 and 2 to Llama
    "rope_scaling": None,
    "rope_theta": float(config.rope_theta),
    "torch_dtype": dtype,
    **sizes,
  }


def _get(raw: Mapping[str, Any], name: str, default: Any) -> Any:
  value = raw.get(name)
  return default if value is None else value


def _required(raw: Mapping[str, Any], name: str) -> Any:
  if raw.get(name) is None:
    raise ValueError(f"config.json lacks {name}")
  return raw[name]


def _refuse(raw: Mapping[str, Any]) -> None:
  for name, allowed in _MUST_BE.items():
    if raw.get(name) is not None and raw[name] not in allowed:
      wants = f"only {allowed[0]!r} is" if allowed else "it is not"
      raise ValueError(f"{name} is {raw[name]!r}: {wants} implemented")
  kinds = _get(raw, "layer_types", [])
  if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
    raise ValueError(f"layer_types is {kinds!r}: only a list of 'full_attention' is implemented")


def _head_dim(raw: Mapping[str, Any], model_type: str) -> int:
  if raw.get("head_dim") is not None:
    return raw["head_dim"]
  if model_type == "qwen3":
    return 128  # the default of transformers for this type alone
  hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
  if type(hidden) is not int or type(heads) is not int or heads < 1 or hidden % heads:
    raise ValueError(
      f"config.json lacks head_dim, and hidden_size={hidden!r} is no multiple of "
      f"num_attention_heads={heads!r}"
    )
  return hidden // heads


def _num_experts(raw: Mapping[str, Any]) -> int:
  """Version 5 writes `num_local_experts`, version 4 `num_experts`."""
  given = [raw[k] for k in ("num_experts", "num_local_experts") if raw.get(k) is not None]
  if not given:
    raise ValueError("config.json lacks num_experts (or num_local_experts)")
  return _one("num_experts", given)


def _rope_theta(raw: Mapping[str, Any]) -> float:
  """Version 4 writes `rope_theta` and `rope_scaling`, version 5 one `rope_parameters`."""
  given = [raw["rope_theta"]] if raw.get("rope_theta") is not None else []
  for name in ("rope_parameters", "rope_scaling"):
    rope = raw.get(name)
    if rope is None:
      continue
    if not isinstance(rope, Mapping):
      raise ValueError(f"{name} must be an object, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
      raise ValueError(f"{name} asks for RoPE of type {kind!r}: only 'default' is implemented")
    for key in rope.keys() - {"rope_type", "type", "rope_theta"}:
      if key != "partial_rotary_factor" or rope[key] != 1:
        raise ValueError(f"{name}.{key} is {rope[key]!r}: it is not implemented")
    if rope.get("rope_theta") is not None:
      given.append(rope["rope_theta"])
  return _one("rope_theta", given) if given else 10_000.0


def _one(name: str, given: list) -> Any:
  if given[-1] != given[0]:
    raise ValueError(f"config.json gives {name} as {given[0]!r} and as {given[-1]!r}")
  return given[0]


def _warn_of_unknown(raw: Mapping[str, Any]) -> None:
  unknown = sorted(raw.keys() - _READ - _IGNORED - _warned)
  if unknown:
    _warned.update(unknown)
    warnings.warn(f"config.json: unknown keys ignored: {', '.join(unknown)}", stacklevel=4)
