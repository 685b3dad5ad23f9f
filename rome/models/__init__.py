"""ROME, the mixture-of-experts decoder.

Sizes, forward pass, KV cache, log-prob head, weights in and out.
"""

from rome.models.balance import RouterLoss
from rome.models.config import Compute, ModelConfig
from rome.models.decoder import (
  Cache,
  extend,
  forward,
  head_kernel,
  hidden_states,
  init_cache,
  init_params,
)
from rome.models.layout import is_stacked, stack_layers, unstack_layers
from rome.models.logprob_head import head_logps
from rome.models.logprobs import (
  Sampling,
  SamplingRows,
  distribution,
  distribution_rows,
  draw,
  token_logps,
)
from rome.models.lora import add_lora, merge_lora, trainable_mask
from rome.models.peft import export as export_adapter
from rome.models.peft import load_adapter
from rome.models.presets import PRESETS
from rome.models.weights import load, save

__all__ = [
  "Cache",
  "Compute",
  "ModelConfig",
  "PRESETS",
  "RouterLoss",
  "Sampling",
  "SamplingRows",
  "add_lora",
  "distribution",
  "distribution_rows",
  "draw",
  "export_adapter",
  "extend",
  "forward",
  "head_kernel",
  "head_logps",
  "hidden_states",
  "init_cache",
  "init_params",
  "is_stacked",
  "load",
  "load_adapter",
  "merge_lora",
  "save",
  "stack_layers",
  "token_logps",
  "trainable_mask",
  "unstack_layers",
]
