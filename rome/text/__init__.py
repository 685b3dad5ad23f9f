"""Tokenizers and chat templates. Never imports jax.

`rome.text.templates` (jinja) and `rome.text.bpe_tokenizer` (tokenizers) are imported where needed.
"""

from rome.text.byte_tokenizer import ByteTokenizer
from rome.text.chat import render_observation, render_prompt
from rome.text.tokenizer import Tokenizer, check_vocabulary

__all__ = [
  "ByteTokenizer",
  "Tokenizer",
  "check_vocabulary",
  "render_observation",
  "render_prompt",
]
