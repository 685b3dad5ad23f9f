"""Sizes of the decoder, and how it is computed.

`ModelConfig` says which function a model is; its fields are named as in a Qwen3-MoE `config.json`.
`Compute` says how it is evaluated. `rome.models.hf_config` reads the `config.json` of public
checkpoints; the presets are in `rome.models.presets`.
"""

import dataclasses
import math

COMPUTE_TYPES = ("float32", "bfloat16")
EXPERTS = ("padded", "dense", "ragged", "megablox")
ATTENTION = ("auto", "xla", "blockwise", "cudnn", "splash")
REMAT = ("none", "dots", "layer")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder with grouped-query attention and RoPE: Qwen3-MoE, dense Qwen3 and Llama.

  Attributes:
    vocab_size: rows of the embedding.
    hidden_size: width of the residual stream.
    num_hidden_layers: blocks.
    num_attention_heads: query heads.
    num_key_value_heads: key/value heads; divides the query heads.
    head_dim: width of a head; even, for RoPE.
    num_experts: experts of a sparse layer; 0 makes every layer dense.
    num_experts_per_tok: experts that each token visits; 0 where there are none.
    moe_intermediate_size: inner width of one expert; 0 where there are none.
    intermediate_size: inner width of a dense layer's MLP; 0 where no layer is dense.
    decoder_sparse_step: layer i is sparse where (i + 1) is a multiple of it.
    mlp_only_layers: layers that are dense whatever the step says.
    norm_topk_prob: whether the weights of the chosen experts are scaled to sum to 1.
    qk_norm: whether queries and keys pass an RMSNorm a head (Qwen3 yes, Llama no).
    attention_bias: whether the four projections of attention have biases.
    rope_theta: RoPE base.
    rms_norm_eps: RMSNorm epsilon.
    tie_word_embeddings: whether the output head is the embedding.
    max_position_embeddings: positions the model was made for; checked by nothing, kept for export.
    query_norm_init: initial scale of the query norm. qk-norm bounds attention logits by this times
      sqrt(head_dim) until training raises it; with narrow heads 1 is too soft to copy a byte.
  """

  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  num_experts: int = 0
  num_experts_per_tok: int = 0
  moe_intermediate_size: int = 0
  intermediate_size: int = 0
  decoder_sparse_step: int = 1
  mlp_only_layers: tuple[int, ...] = ()
  norm_topk_prob: bool = True
  qk_norm: bool = True
  attention_bias: bool = False
  rope_theta: float = 10_000.0
  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = True
  max_position_embeddings: int = 32_768
  query_norm_init: float = 1.0

  def __post_init__(self) -> None:
    may_be_zero = (
      "num_experts",
      "num_experts_per_tok",
      "moe_intermediate_size",
      "intermediate_size",
    )
    for field in dataclasses.fields(self):
      value, least = getattr(self, field.name), 0 if field.name in may_be_zero else 1
      if field.type is int and (type(value) is not int or value < least):
        raise ValueError(f"model.{field.name} must be an int >= {least}, got {value!r}")
      if field.type is float and not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ValueError(f"model.{field.name} must be a positive number, got {value!r}")
      if field.type is bool and not isinstance(value, bool):
        raise ValueError(f"model.{field.name} must be true or false, got {value!r}")
    self._check_layers()
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f"model.num_key_value_heads={self.num_key_value_heads} must divide "
        f"num_attention_heads={self.num_attention_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"model.head_dim must be even for RoPE, got {self.head_dim}")

  def _check_layers(self) -> None:
    object.__setattr__(self, "mlp_only_layers", tuple(self.mlp_only_layers))  # JSON gives a list
    for layer in self.mlp_only_layers:
      if type(layer) is not int or not 0 <= layer < self.num_hidden_layers:
        raise ValueError(
          f"model.mlp_only_layers must name layers 0..{self.num_hidden_layers - 1}, got {layer!r}"
        )
    if self.num_experts_per_tok > self.num_experts:
      raise ValueError(
        f"model.num_experts_per_tok={self.num_experts_per_tok} exceeds "
        f"num_experts={self.num_experts}"
      )
    sparse = [self.is_sparse(i) for i in range(self.num_hidden_layers)]
    if any(sparse) and not (self.num_experts_per_tok and self.moe_intermediate_size):
      raise ValueError(
        "model.num_experts_per_tok and moe_intermediate_size must be >= 1 with experts"
      )
    if not all(sparse) and not self.intermediate_size:
      raise ValueError(
        f"model.intermediate_size must be >= 1: layer {sparse.index(False)} is dense "
        "(num_experts, mlp_only_layers, decoder_sparse_step)"
      )

  def is_sparse(self, layer: int) -> bool:
    """Whether layer `layer` has experts."""
    step = (layer + 1) % self.decoder_sparse_step == 0
    return self.num_experts > 0 and layer not in self.mlp_only_layers and step


@dataclasses.dataclass(frozen=True)
class Compute:
  """How a model is evaluated: rounding, speed and memory, never what it means.

  Attributes:
    dtype: of activations and matrix products. Parameters are cast where they are used; the router,
      norms, softmax, logits and losses are float32 always.
    experts: implementation of the experts, see `rome.models.experts`.
    attention: implementation of attention over whole rows, see `rome.models.attention`; "auto"
      follows the backend.
    remat: what the backward pass computes again instead of keeping: "none", "dots" (all but matrix
      products of weights), "layer" (all but the input of each layer).
  """

  dtype: str = "float32"
  experts: str = "padded"
  attention: str = "auto"
  remat: str = "none"

  def __post_init__(self) -> None:
    allowed = {"dtype": COMPUTE_TYPES, "experts": EXPERTS, "attention": ATTENTION, "remat": REMAT}
    for name, choices in allowed.items():
      value = getattr(self, name)
      if value not in choices:
        raise ValueError(f"compute.{name} must be one of {', '.join(choices)}, got {value!r}")


DEFAULT_COMPUTE = Compute()
# What generation uses: a row's bits depend on that row and its place in the batch alone.
ROW_COMPUTE = Compute(experts="dense")
