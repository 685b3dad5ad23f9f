"""What a model must compute and read, counted from its sizes."""

from rome import models


def context_flops(config: models.ModelConfig, start: int, end: int) -> float:
  """Operations of matrix products that the context tokens at places start..end-1 take; no head."""
  c, keys = config, (start + 1 + end) / 2  # that a query sees, on average
  total = 0.0
  for i in range(c.num_hidden_layers):
    total += 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    total += 2 * c.num_attention_heads * c.head_dim * keys
    if c.is_sparse(i):
      chosen = 3 * c.num_experts_per_tok * c.moe_intermediate_size
      total += c.hidden_size * (c.num_experts + chosen)
    else:
      total += 3 * c.hidden_size * c.intermediate_size
  return 2.0 * total * (end - start)


def step_bytes(
  config: models.ModelConfig, batch: int, context: float, distinct: float, itemsize: int
) -> float:
  """Bytes that a decode step must read at least; norms and the embedding's rows are left out.

  Args:
    config: the model.
    batch: rows.
    context: keys that a row attends to.
    distinct: experts that some row chose, on average over the sparse layers.
    itemsize: bytes of a number.
  """
  c = config
  numbers = float(c.hidden_size * c.vocab_size)
  for i in range(c.num_hidden_layers):
    numbers += 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    numbers += 2 * c.num_key_value_heads * c.head_dim * context * batch
    if c.is_sparse(i):
      numbers += c.hidden_size * (c.num_experts + 3 * distinct * c.moe_intermediate_size)
    else:
      numbers += 3 * c.hidden_size * c.intermediate_size
  return numbers * itemsize
