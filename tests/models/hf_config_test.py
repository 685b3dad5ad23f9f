"""`config.json` of transformers 4 and 5 is read; what is not implemented is refused by name."""

import json
import warnings

import pytest

from rome import models
from rome.models import hf_config

# As transformers 4 wrote it for Qwen/Qwen3-30B-A3B.
QWEN3_MOE_V4 = {
  "architectures": ["Qwen3MoeForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "bos_token_id": 151643,
  "decoder_sparse_step": 1,
  "eos_token_id": 151645,
  "head_dim": 128,
  "hidden_act": "silu",
  "hidden_size": 2048,
  "initializer_range": 0.02,
  "intermediate_size": 6144,
  "max_position_embeddings": 40960,
  "max_window_layers": 48,
  "mlp_only_layers": [],
  "model_type": "qwen3_moe",
  "moe_intermediate_size": 768,
  "norm_topk_prob": True,
  "num_attention_heads": 32,
  "num_experts": 128,
  "num_experts_per_tok": 8,
  "num_hidden_layers": 48,
  "num_key_value_heads": 4,
  "output_router_logits": False,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 1000000.0,
  "router_aux_loss_coef": 0.001,
  "sliding_window": None,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.51.0",
  "use_cache": True,
  "use_sliding_window": False,
  "vocab_size": 151936,
}
LLAMA = {
  "model_type": "llama",
  "hidden_size": 576,
  "intermediate_size": 1536,
  "is_llama_config": True,
  "max_position_embeddings": 8192,
  "num_attention_heads": 9,
  "num_hidden_layers": 30,
  "num_key_value_heads": 3,
  "rms_norm_eps": 1e-05,
  "rope_interleaved": False,
  "rope_theta": 100000,
  "tie_word_embeddings": True,
  "vocab_size": 49152,
}


def without(raw, *names):
  return {k: v for k, v in raw.items() if k not in names}


@pytest.fixture(autouse=True)
def no_warnings(monkeypatch):
  monkeypatch.setattr(hf_config, "_warned", set())
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    yield


def test_public_configs_are_the_presets():
  assert hf_config.from_dict(QWEN3_MOE_V4) == models.PRESETS["qwen3_30b_a3b"]
  assert hf_config.from_dict(LLAMA) == models.PRESETS["smollm2_135m"]


def test_version_5_says_the_same():
  raw = without(QWEN3_MOE_V4, "num_experts", "rope_theta", "rope_scaling", "torch_dtype") | {
    "num_local_experts": 128,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "dtype": "bfloat16",
    "mlp_only_layers": None,
  }
  assert hf_config.from_dict(raw) == models.PRESETS["qwen3_30b_a3b"]


@pytest.mark.parametrize("name", sorted(models.PRESETS))
def test_a_written_config_comes_back(name):
  config = models.PRESETS[name]
  written = json.loads(json.dumps(hf_config.to_dict(config, "bfloat16")))
  assert hf_config.from_dict(written) == config
  assert written["torch_dtype"] == "bfloat16"
  assert ("query_norm_init" in written) == (config.query_norm_init != 1)
  assert written["architectures"] == [hf_config.ARCHITECTURES[written["model_type"]]]


def test_missing_keys_are_what_transformers_takes_them_for():
  names = ("rope_theta", "rms_norm_eps", "tie_word_embeddings", "head_dim", "norm_topk_prob")
  more = ("mlp_only_layers", "decoder_sparse_step", "attention_bias")
  config = hf_config.from_dict(without(QWEN3_MOE_V4, *names, *more))
  assert (config.rope_theta, config.rms_norm_eps, config.head_dim) == (10_000.0, 1e-6, 64)
  assert not config.tie_word_embeddings and not config.norm_topk_prob
  assert config.mlp_only_layers == () and config.decoder_sparse_step == 1
  assert hf_config.from_dict(without(LLAMA, "num_key_value_heads")).num_key_value_heads == 9
  qwen3 = without(LLAMA, "rope_interleaved", "is_llama_config") | {"model_type": "qwen3"}
  config = hf_config.from_dict(qwen3)
  assert config.head_dim == 128 and config.qk_norm


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "mixtral"}, "model_type must be one of qwen3_moe, qwen3, llama, got 'mixtral'"),
    ({"model_type": None}, "model_type must be one of"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu': only 'silu' is implemented"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ({"use_sliding_window": True}, "use_sliding_window is True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*sliding"),
    ({"layer_types": 3}, "layer_types is 3"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is .*: it is not implemented"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling asks .* 'yarn'"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters asks .* 'llama3'"),
    ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention is {}"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
    ({"rope_parameters": 3}, "rope_parameters must be an object, got 3"),
    ({"rope_parameters": {"rope_theta": 5.0}}, "gives rope_theta as 1000000.0 and as 5.0"),
    ({"rope_theta": [3]}, "model.rope_theta must be a positive number"),
    ({"num_local_experts": 64}, "gives num_experts as 128 and as 64"),
    ({"num_experts": None}, r"lacks num_experts \(or num_local_experts\)"),
    ({"hidden_size": None}, "lacks hidden_size"),
    ({"hidden_size": "2048"}, "model.hidden_size must be an int"),
    ({"mlp_only_layers": 3}, "mlp_only_layers must be a list"),
    ({"head_dim": None, "hidden_size": 2047}, "lacks head_dim, and hidden_size=2047"),
    ({"head_dim": None, "num_attention_heads": 0}, "lacks head_dim"),
    ({"vocab_size": True}, "model.vocab_size"),
  ],
)
def test_what_is_not_implemented_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    hf_config.from_dict(QWEN3_MOE_V4 | changes)


def test_odd_values_never_break_out():
  """Whatever JSON stands at a key: a model, or a ValueError; and soon."""
  odd = (None, True, -1, 0, 10**30, float("inf"), float("nan"), "x", [], [[1]], {}, {"a": {}})
  refused = 0
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for raw in (QWEN3_MOE_V4, LLAMA):
      for name in hf_config._READ | hf_config._IGNORED:
        for value in odd:
          try:
            hf_config.from_dict(raw | {name: value})
          except ValueError:
            refused += 1
  assert refused > 300
  with pytest.raises(ValueError, match="num_hidden_layers is 10001, want at most 10000"):
    hf_config.from_dict(QWEN3_MOE_V4 | {"num_hidden_layers": 10_001})


def test_a_default_rope_scaling_is_none():
  for rope in ({"type": "default"}, {"rope_type": "default", "rope_theta": 1000000.0}):
    config = hf_config.from_dict(QWEN3_MOE_V4 | {"rope_scaling": rope})
    assert config == models.PRESETS["qwen3_30b_a3b"]


def test_unknown_keys_are_named_once():
  raw = LLAMA | {"vision_tower": 3, "adapters": None}
  with pytest.warns(UserWarning, match="unknown keys ignored: adapters, vision_tower"):
    assert hf_config.from_dict(raw) == models.PRESETS["smollm2_135m"]
  hf_config.from_dict(raw)  # a second warning would be an error


def test_no_model_type_has_experts_without_qk_norm():
  config = models.PRESETS["micro"]
  with pytest.raises(ValueError, match="experts without qk_norm"):
    hf_config.to_dict(type(config)(**{**vars(config), "qk_norm": False}))
