"""Presets are what they say, and impossible sizes are refused by name."""

import dataclasses

import jax
import pytest

from rome import models

MICRO = models.PRESETS["micro"]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"vocab_size": 0}, "model.vocab_size must be an int >= 1, got 0"),
    ({"num_hidden_layers": -1}, "model.num_hidden_layers must be an int >= 1, got -1"),
    ({"hidden_size": 16.0}, "model.hidden_size must be an int >= 1, got 16.0"),
    ({"num_experts": "4"}, "model.num_experts must be an int >= 0, got '4'"),
    ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_key_value_heads=2 must divide"),
    ({"head_dim": 7}, "model.head_dim must be even for RoPE, got 7"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 exceeds num_experts=4"),
    ({"rope_theta": 0.0}, "model.rope_theta must be a positive number, got 0.0"),
    ({"rope_theta": "1e4"}, "model.rope_theta must be a positive number, got '1e4'"),
    ({"rms_norm_eps": float("nan")}, "model.rms_norm_eps must be a positive number, got nan"),
    ({"num_experts": 0}, "num_experts_per_tok=2 exceeds num_experts=0"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok and moe_intermediate_size must be >= 1"),
    ({"mlp_only_layers": (0,)}, "intermediate_size must be >= 1: layer 0 is dense"),
    ({"mlp_only_layers": (2,)}, "mlp_only_layers must name layers 0..1, got 2"),
    ({"norm_topk_prob": 1}, "model.norm_topk_prob must be true or false, got 1"),
  ],
)
def test_impossible_sizes(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(MICRO, **change)


def parameters(config):
  shapes = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_the_tiny_preset_is_the_model_of_the_quickstart():
  tiny = models.PRESETS["tiny"]
  assert tiny.num_hidden_layers >= 4 and tiny.num_experts >= 8 and tiny.num_experts_per_tok == 2
  assert tiny.num_key_value_heads < tiny.num_attention_heads
  assert 2e6 <= parameters(tiny) <= 8e6


@pytest.mark.slow
@pytest.mark.parametrize(
  ("preset", "total", "active"),
  [
    ("bench_small", 90e6, 46e6),
    ("smollm2_135m", 134.5e6, 134.5e6),
    ("dense_1b", 1.07e9, 1.07e9),
    ("moe_1b", 0.98e9, 0.19e9),
    ("moe_7b", 6.9e9, 1.63e9),
    ("qwen3_30b_a3b", 30.5e9, 3.35e9),
  ],
)
def test_the_sizes_of_the_presets(preset, total, active):
  """Within two percent of what their comments and names say; active counts both embeddings."""
  c = models.PRESETS[preset]
  assert parameters(c) == pytest.approx(total, rel=0.02)
  idle = c.num_hidden_layers * (c.num_experts - c.num_experts_per_tok)
  unused = idle * 3 * c.hidden_size * c.moe_intermediate_size
  assert parameters(c) - unused == pytest.approx(active, rel=0.05)


def test_which_layers_are_sparse():
  c = dataclasses.replace(
    MICRO, num_hidden_layers=6, intermediate_size=8, decoder_sparse_step=2, mlp_only_layers=[3]
  )
  assert [c.is_sparse(i) for i in range(6)] == [False, True, False, False, False, True]
  assert hash(c)  # a list from JSON became a tuple


@pytest.mark.parametrize("field", ["dtype", "experts", "attention", "remat"])
def test_unknown_ways_to_compute(field):
  with pytest.raises(ValueError, match=f"compute.{field} must be one of .*, got 'nonsense'"):
    models.Compute(**{field: "nonsense"})


def test_parameters_counted_by_hand():
  c = MICRO
  attention = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
  experts = c.num_experts * c.hidden_size * c.moe_intermediate_size * 3
  router, norms = c.hidden_size * c.num_experts, 2 * c.hidden_size + 2 * c.head_dim
  layer = attention + experts + router + norms
  body = c.num_hidden_layers * layer + c.hidden_size
  assert parameters(c) == body + c.vocab_size * c.hidden_size
  untied = dataclasses.replace(c, tie_word_embeddings=False)
  assert parameters(untied) == body + 2 * c.vocab_size * c.hidden_size
