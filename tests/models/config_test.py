"""Presets are what they say, and impossible sizes are refused by name."""

import dataclasses

import jax
import pytest

from rome import models

MICRO = models.PRESETS["micro"]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"vocab_size": 0}, "model.vocab_size must be a positive int, got 0"),
    ({"num_hidden_layers": -1}, "model.num_hidden_layers must be a positive int, got -1"),
    ({"hidden_size": 16.0}, "model.hidden_size must be a positive int, got 16.0"),
    ({"num_experts": "4"}, "model.num_experts must be a positive int, got '4'"),
    ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_key_value_heads=2 must divide"),
    ({"head_dim": 7}, "model.head_dim must be even for RoPE, got 7"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 exceeds num_experts=4"),
    ({"rope_theta": 0.0}, "model.rope_theta must be a positive number, got 0.0"),
    ({"rope_theta": "1e4"}, "model.rope_theta must be a positive number, got '1e4'"),
    ({"rms_norm_eps": float("nan")}, "model.rms_norm_eps must be a positive number, got nan"),
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
