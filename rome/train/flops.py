"""Parameters and floating-point operations of a model, counted by hand.

A multiplication and an addition are two operations. Counted are matrix products with weights and
attention; norms, softmax, rotary embeddings and the lookup of embeddings are not, as is the custom
of model FLOPs utilisation (Chowdhery et al., arXiv:2204.02311, appendix B).
"""

from rome.models import ModelConfig


def _layer_parameters(config: ModelConfig, layer: int, experts: int) -> int:
  """Weights that multiply each token in one layer, `experts` experts counted."""
  c = config
  heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
  attention = c.hidden_size * c.head_dim * heads
  if not c.is_sparse(layer):
    return attention + 3 * c.hidden_size * c.intermediate_size
  one_expert = 3 * c.hidden_size * c.moe_intermediate_size
  return attention + c.hidden_size * c.num_experts + experts * one_expert


def layer_parameters(config: ModelConfig, all_experts: bool = False) -> int:
  """Weights of all layers that multiply each token: of its chosen experts, or of all."""
  experts = config.num_experts if all_experts else config.num_experts_per_tok
  return sum(_layer_parameters(config, i, experts) for i in range(config.num_hidden_layers))


def head_parameters(config: ModelConfig) -> int:
  """Weights of the output head."""
  return config.hidden_size * config.vocab_size


def _attention(config: ModelConfig, pairs: float) -> float:
  """Operations of attention over `pairs` of a query and a key it sees: scores and sums."""
  width = config.num_attention_heads * config.head_dim
  return 4.0 * config.num_hidden_layers * width * pairs


def train_flops(config: ModelConfig, batch: int, length: int, remat: str) -> tuple[float, float]:
  """Operations of one gradient: (of the model, of the machine).

  Args:
    config: the model's sizes.
    batch: rows.
    length: tokens a row, of one segment.
    remat: `Compute.remat`. The machine's count adds what is computed again: with "layer" the
      forward pass of the layers, with "dots" attention; always the logits of the fused head, and
      the scores that a fused attention has not kept.
  """
  tokens = batch * length
  layers = 2.0 * layer_parameters(config) * tokens
  head = 2.0 * head_parameters(config) * tokens
  attention = _attention(config, batch * length * (length + 1) / 2)
  model = 3 * (layers + head + attention)
  again = head + attention / 2
  again += {"none": 0.0, "dots": attention, "layer": layers + attention}[remat]
  return model, model + again


def decode_flops(
  config: ModelConfig, batch: int, length: int, all_experts: bool
) -> tuple[float, float]:
  """Operations of one new token in each row with `length` places: (of the model, of the machine).

  The machine computes every expert where `all_experts`.
  """
  rest = 2.0 * head_parameters(config) * batch + _attention(config, batch * length)
  model, machine = (2.0 * batch * layer_parameters(config, e) for e in (False, all_experts))
  return model + rest, machine + rest
