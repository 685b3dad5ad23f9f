"""ROME, the mixture-of-experts decoder.

Sizes, forward pass, KV cache, log-prob head, weights in and out.
"""

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
from rome.models.logprobs import Sampling, distribution, token_logps
from rome.models.presets import PRESETS
from rome.models.weights import load, save

__all__ = [
  "Cache",
  "Compute",
  "ModelConfig",
  "PRESETS",
  "Sampling",
  "distribution",
  "extend",
  "forward",
  "head_kernel",
  "hidden_states",
  "init_cache",
  "init_params",
  "is_stacked",
  "load",
  "save",
  "stack_layers",
  "token_logps",
  "unstack_layers",
]
