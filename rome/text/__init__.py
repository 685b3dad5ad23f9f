"""Tokenizers and chat templates. Never imports jax."""

from rome.text.byte_tokenizer import ByteTokenizer
from rome.text.chat import render_observation, render_prompt

__all__ = ["ByteTokenizer", "render_observation", "render_prompt"]
