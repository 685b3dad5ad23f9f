"""Sizes of the ROME decoder and its presets. Field names are those of a Qwen3-MoE `config.json`.

Reading other checkpoints' configs, dense layers and the large presets are not here yet.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A mixture-of-experts decoder with grouped-query attention, RoPE and qk-norm.

  Attributes:
    vocab_size: rows of the embedding.
    hidden_size: width of the residual stream.
    num_hidden_layers: blocks; every block has experts.
    num_attention_heads: query heads.
    num_key_value_heads: key/value heads; divides the query heads.
    head_dim: width of a head; even, for RoPE.
    num_experts: experts a layer.
    num_experts_per_tok: experts that each token visits.
    moe_intermediate_size: inner width of one expert.
    norm_topk_prob: whether the weights of the chosen experts are scaled to sum to 1.
    rope_theta: RoPE base.
    rms_norm_eps: RMSNorm epsilon.
    tie_word_embeddings: whether the output head is the embedding.
    query_norm_init: initial scale of the query norm. qk-norm bounds attention logits by this times
      sqrt(head_dim) until training raises it; with narrow heads 1 is too soft to copy a byte.
  """

  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  num_experts: int
  num_experts_per_tok: int
  moe_intermediate_size: int
  norm_topk_prob: bool = True
  rope_theta: float = 10_000.0
  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = True
  query_norm_init: float = 1.0

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is int and (not isinstance(value, int) or value < 1):
        raise ValueError(f"model.{field.name} must be a positive int, got {value!r}")
      if field.type is float and not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ValueError(f"model.{field.name} must be a positive number, got {value!r}")
      if field.type is bool and not isinstance(value, bool):
        raise ValueError(f"model.{field.name} must be true or false, got {value!r}")
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f"model.num_key_value_heads={self.num_key_value_heads} must divide "
        f"num_attention_heads={self.num_attention_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"model.head_dim must be even for RoPE, got {self.head_dim}")
    if self.num_experts_per_tok > self.num_experts:
      raise ValueError(
        f"model.num_experts_per_tok={self.num_experts_per_tok} exceeds "
        f"num_experts={self.num_experts}"
      )


PRESETS = {
  # 2.2 M parameters: learns shell tasks in minutes on two CPU cores.
  "tiny": ModelConfig(
    vocab_size=264,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=160,
    query_norm_init=2.5,
  ),
  # For tests: compiles in seconds, learns nothing.
  "micro": ModelConfig(
    vocab_size=264,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
  ),
}
