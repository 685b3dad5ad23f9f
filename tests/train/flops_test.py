"""Counts by hand, and against XLA's count of a forward pass without loops or kernels."""

import jax
import jax.numpy as jnp
import pytest

from rome import models
from rome.train import flops

MICRO = models.PRESETS["micro"]
# One layer of micro: q and o 16 x 16, k and v 16 x 8, router 16 x 4, an expert 3 x 16 x 16.
LAYER = 2 * 256 + 2 * 128 + 64 + 2 * 768
HEAD = 16 * 264


def test_parameters_of_micro():
  assert flops.layer_parameters(MICRO) == 2 * LAYER
  assert flops.layer_parameters(MICRO, all_experts=True) == 2 * (LAYER + 2 * 768)
  assert flops.head_parameters(MICRO) == HEAD


def test_qwen3_30b_has_3_3_billion_active_parameters():
  config = models.PRESETS["qwen3_30b_a3b"]
  embedding = flops.head_parameters(config)
  # Alibaba's model card: 30.5 B parameters, 3.3 B activated, both with embeddings.
  assert flops.layer_parameters(config, all_experts=True) + 2 * embedding == pytest.approx(
    30.5e9, rel=2e-3
  )
  assert flops.layer_parameters(config) + 2 * embedding == pytest.approx(3.3e9, rel=2e-2)


def test_train_flops_of_micro():
  tokens, pairs = 3 * 8, 3 * 36  # causal: 8 * 9 / 2 pairs a row
  attention = 4 * 2 * 16 * pairs  # scores and sums, two layers, two heads of 8
  model, machine = flops.train_flops(MICRO, 3, 8, "none")
  assert model == 6 * (2 * LAYER + HEAD) * tokens + 3 * attention
  assert machine - model == 2 * HEAD * tokens + attention / 2
  _, layer = flops.train_flops(MICRO, 3, 8, "layer")
  assert layer - machine == 4 * LAYER * tokens + attention
  _, dots = flops.train_flops(MICRO, 3, 8, "dots")
  assert dots - machine == attention


def test_decode_flops_of_micro():
  rest = 5 * (2 * HEAD + 4 * 2 * 16 * 100)
  model, machine = flops.decode_flops(MICRO, 5, 100, all_experts=True)
  assert model == 5 * 4 * LAYER + rest
  assert machine == 5 * 4 * (LAYER + 2 * 768) + rest


def test_forward_pass_agrees_with_xla():
  config, batch, length = models.PRESETS["tiny"], 2, 64
  params = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
  tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  # Dense experts and whole [T, T] scores: what XLA multiplies is all experts and all pairs.
  compute = models.Compute(experts="dense", attention="xla")
  run = jax.jit(lambda p, t: models.forward(config, p, t, t, t, compute))
  counted = run.lower(params, tokens).compile().cost_analysis()["flops"]
  weights = flops.layer_parameters(config, all_experts=True) + flops.head_parameters(config)
  pairs = batch * length**2
  expected = 2 * weights * batch * length + 4 * config.num_hidden_layers * 128 * pairs
  assert counted == pytest.approx(expected, rel=0.1)
