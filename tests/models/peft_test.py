"""Adapters of PEFT: what it wrote says the same here, and what is written here is what it wrote.

The goldens are made by goldens/make_peft.py.
"""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from rome import models
from rome.models import lora, peft

GOLDENS = pathlib.Path(__file__).parent / "goldens"
NAMES = ["peft_moe", "peft_dense"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
forward = jax.jit(models.forward, static_argnums=(0, 5))


@functools.cache
def golden(name):
  """(sizes, frozen parameters, tokens, logits of the adapted model)."""
  files = (np.load(GOLDENS / name / f"{file}.npy") for file in ("input_ids", "logits"))
  return *models.load(GOLDENS / name), *files


def copy_of(name, tmp_path, **changes):
  """The golden's adapter with other settings."""
  for file in ("adapter_config.json", "adapter_model.safetensors"):
    shutil.copy(GOLDENS / name / "adapter" / file, tmp_path / file)
  settings = json.loads((tmp_path / "adapter_config.json").read_text()) | changes
  (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
  return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stacked", [False, True])
def test_what_peft_trained_says_the_same_here(name, stacked):
  config, params, tokens, logits = golden(name)
  if stacked:
    params = models.stack_layers(config, params)
  adapted = peft.load_adapter(GOLDENS / name / "adapter", config, params)
  segments, positions = np.ones_like(tokens), np.tile(np.arange(12, dtype=np.int32), (2, 1))
  said = [
    forward(config, p, tokens, segments, positions, models.Compute(experts="dense"))
    for p in (adapted, lora.merge_lora(adapted), params)
  ]
  np.testing.assert_allclose(said[0], logits, atol=1e-5)
  np.testing.assert_allclose(said[1], logits, atol=1e-5)
  assert np.abs(said[2] - logits).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stacked", [False, True])
def test_what_is_written_is_what_peft_wrote(name, stacked, tmp_path):
  config, params, _, _ = golden(name)
  if stacked:
    params = models.stack_layers(config, params)
  peft.export(tmp_path, config, peft.load_adapter(GOLDENS / name / "adapter", config, params))
  places = tmp_path, GOLDENS / name / "adapter"
  ours, theirs = (safetensors.numpy.load_file(p / "adapter_model.safetensors") for p in places)
  assert ours.keys() == theirs.keys()
  for key, value in theirs.items():
    np.testing.assert_array_equal(ours[key], value, err_msg=key)
  ours, theirs = (json.loads((p / "adapter_config.json").read_text()) for p in places)
  for key in ours:
    same = (sorted(x[key] or []) if "target" in key else x[key] for x in (ours, theirs))
    assert next(same) == next(same), key


@pytest.mark.parametrize("target", ["experts.gate_up_proj", "experts.down_proj"])
def test_one_projection_of_experts_is_not_nested(target, tmp_path):
  config, params, _, _ = golden("peft_moe")
  adapted = lora.add_lora(config, params, jax.random.key(1), 2, 2.5, [target])
  peft.export(tmp_path, config, adapted, base_model="some/model")
  names = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors").keys()
  stem = "base_model.model.model.layers."
  assert names == {f"{stem}{i}.mlp.experts.lora_{x}.weight" for i in (1, 2) for x in "AB"}
  settings = json.loads((tmp_path / "adapter_config.json").read_text())
  assert settings["target_parameters"] == [f"mlp.{target}"] and settings["target_modules"] == []
  assert settings["lora_alpha"] == 2.5 and settings["base_model_name_or_path"] == "some/model"
  again = peft.load_adapter(tmp_path, config, params)
  jax.tree.map(np.testing.assert_array_equal, again, adapted)


def test_what_peft_cannot_say_is_refused(tmp_path):
  config, params, _, _ = golden("peft_moe")
  adapted = lora.add_lora(config, params, jax.random.key(1), 2, 4.0, ["q_proj", "up_proj"])
  with pytest.raises(ValueError, match="no name for up_proj of dense layers in a model with"):
    peft.export(tmp_path, config, adapted)
  with pytest.raises(ValueError, match="no lora adapters to export"):
    peft.export(tmp_path, config, params)
  adapted = lora.add_lora(config, params, jax.random.key(1), 2, 4.0, ["q_proj"])
  node = adapted["layers_1"]["attn"]["q_proj"]
  node["lora_alpha"] = node["lora_alpha"] * 2
  with pytest.raises(ValueError, match=r"differ in \(rank, alpha\).*4.0.*8.0"):
    peft.export(tmp_path, config, adapted)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"use_dora": True}, "use_dora=True is not plain LoRA"),
    ({"use_rslora": True}, "use_rslora=True is not plain LoRA"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern={'q_proj': 4} is not plain LoRA"),
    ({"bias": "all"}, "bias='all' is not plain LoRA"),
    ({"peft_type": "LOHA"}, "peft_type='LOHA' is not plain LoRA"),
    ({"target_modules": ".*"}, "target_modules='.*' is a pattern"),
    ({"target_modules": [*ATTENTION, "w1"]}, "lora target 'w1' is unknown"),
    ({"target_modules": ATTENTION}, "unknown tensor base_model.model.model.layers.0.mlp.down_proj"),
    ({"target_modules": ["lm_head"]}, "lora target 'lm_head': the model's head is its embedding"),
    ({"r": 4}, r"q_proj.lora_A.weight has shape \(3, 16\), the model and r=4 ask \(4, 16\)"),
    ({"r": 0}, "r=0 and lora_alpha=5 must be positive"),
    ({"lora_alpha": None}, "lora_alpha=None must be positive"),
  ],
)
def test_settings_that_are_not_read_are_named(changes, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    peft.load_adapter(copy_of("peft_dense", tmp_path, **changes), *golden("peft_dense")[:2])


def test_damaged_files_are_named(tmp_path):
  config, params, _, _ = golden("peft_dense")
  with pytest.raises(ValueError, match="no usable adapter in .*nowhere"):
    peft.load_adapter(tmp_path / "nowhere", config, params)
  file = copy_of("peft_dense", tmp_path) / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
  safetensors.numpy.save_file(tensors | {key: tensors[key] * np.nan}, file)
  with pytest.raises(ValueError, match="v_proj.lora_B.weight has NaN"):
    peft.load_adapter(tmp_path, config, params)
  safetensors.numpy.save_file({k: v for k, v in tensors.items() if k != key}, file)
  with pytest.raises(ValueError, match="missing tensor .*layers.1.self_attn.v_proj.lora_B.weight"):
    peft.load_adapter(tmp_path, config, params)
  file.write_bytes(file.read_bytes()[:500])
  with pytest.raises(ValueError, match="no usable adapter in"):
    peft.load_adapter(tmp_path, config, params)
