"""ROME, the mixture-of-experts decoder.

Sizes, forward pass, KV cache, log-prob head, weights in and out.
"""

from rome.models.config import PRESETS, ModelConfig
from rome.models.decoder import Cache, extend, forward, init_cache, init_params
from rome.models.logprobs import Sampling, distribution, token_logps
from rome.models.weights import load, save

__all__ = [
  "Cache",
  "ModelConfig",
  "PRESETS",
  "Sampling",
  "distribution",
  "extend",
  "forward",
  "init_cache",
  "init_params",
  "load",
  "save",
  "token_logps",
]
