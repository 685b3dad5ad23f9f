"""Weights survive the disk bit for bit, and a file that does not fit is refused by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from rome import models

CONFIG = dataclasses.replace(models.PRESETS["micro"], num_hidden_layers=1)
NAME = "layers_0.mlp.down_proj"
init = jax.jit(models.init_params, static_argnums=0)


@pytest.fixture(scope="module")
def params():
  return init(CONFIG, jax.random.key(3))


@pytest.fixture
def saved(tmp_path, params):
  models.save(tmp_path / "m", CONFIG, params)
  return tmp_path / "m"


def test_round_trip_is_exact(saved, params):
  config, loaded = models.load(saved)
  assert config == CONFIG
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(a, b, strict=True)


def test_the_untied_head_travels_too(tmp_path, params):
  config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
  head = np.arange(16 * 264, dtype=np.float32).reshape(16, 264)
  models.save(tmp_path, config, params | {"lm_head": {"kernel": head}})
  np.testing.assert_array_equal(models.load(tmp_path)[1]["lm_head"]["kernel"], head)
  with pytest.raises(ValueError, match="missing tensor lm_head.kernel"):
    models.save(tmp_path, config, params)
    models.load(tmp_path)


def edit(saved, change):
  """Applies `change` to the dict of tensors on disk."""
  file = saved / "model.safetensors"
  flat = safetensors.numpy.load_file(file)
  change(flat)
  safetensors.numpy.save_file(flat, file)


def fill(value):
  def change(flat):
    flat[NAME][0, 0, 0] = value

  return change


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda flat: flat.pop(NAME), f"missing tensor {NAME}"),
    (lambda flat: flat.update(more=np.zeros(3, np.float32)), "unknown tensor more"),
    (
      lambda flat: flat.update({NAME: flat[NAME][:, :-1].copy()}),
      rf"{NAME} has shape \(4, 15, 16\), config.json asks \(4, 16, 16\)",
    ),
    (lambda flat: flat.update({NAME: flat[NAME].astype(np.int32)}), f"{NAME} has type int32"),
    (fill(np.nan), f"{NAME} has NaN or infinite values"),
    (fill(np.inf), f"{NAME} has NaN or infinite values"),
  ],
)
def test_a_bad_tensor_is_named(saved, change, message):
  edit(saved, change)
  with pytest.raises(ValueError, match=f"{saved}: {message}"):
    models.load(saved)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_file(saved, keep):
  file = saved / "model.safetensors"
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(ValueError, match=f"no usable model in {saved}"):
    models.load(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file(saved, name):
  (saved / name).unlink()
  with pytest.raises(ValueError, match=f"no usable model in {saved}: .*{name}|No such file"):
    models.load(saved)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "Expecting"),
    ("[]", "mapping"),
    (json.dumps(dataclasses.asdict(CONFIG) | {"layers": 3}), "layers"),
    (json.dumps(dataclasses.asdict(CONFIG) | {"head_dim": 7}), "model.head_dim"),
  ],
)
def test_a_config_that_is_none(saved, content, message):
  (saved / "config.json").write_text(content)
  with pytest.raises(ValueError, match=f"no usable model in {saved}: .*{message}"):
    models.load(saved)
