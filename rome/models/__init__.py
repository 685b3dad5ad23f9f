"""ROME, the mixture-of-experts decoder: sizes, forward pass, KV cache, log-prob head, weights in and out."""

from rome.models.config import ModelConfig
from rome.models.config import PRESETS
from rome.models.decoder import Cache
from rome.models.decoder import extend
from rome.models.decoder import forward
from rome.models.decoder import init_cache
from rome.models.decoder import init_params
from rome.models.logprobs import distribution
from rome.models.logprobs import Sampling
from rome.models.logprobs import token_logps
from rome.models.weights import load
from rome.models.weights import save

__all__ = [
    "Cache", "ModelConfig", "PRESETS", "Sampling", "distribution", "extend", "forward", "init_cache", "init_params",
    "load", "save", "token_logps",
]
