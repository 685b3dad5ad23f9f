"""Tokens as the API shows them: text, bytes, offsets into the reply's text.

A token need not be text: a character may take several tokens. The API shows such a token as
"bytes:\\xf0\\x9f" and, in chats, gives its bytes beside it.

Choice: every sampled token is listed, the stop token and the tokens of a stop string too, so that
lists of log-probs are as long as `token_ids` and `completion_tokens` says.
"""

import codecs
import functools
from collections.abc import Sequence
from typing import Any

from rome.rollout.engine.request import Alternatives
from rome.text import Tokenizer

# What JSON has no number for: the log-prob of an alternative that top-k, top-p or min-p exclude.
LEAST = -9999.0


class Vocabulary:
  """The bytes of every token.

  Args:
    tokenizer: the model's.
    size: rows of the model; ids beyond the tokenizer's stand for nothing.
  Attributes:
    tokenizer, size: as given.
    longest: bytes of the longest token; a text of n bytes has at least n / longest tokens.
  """

  def __init__(self, tokenizer: Tokenizer, size: int):
    self.tokenizer, self.size = tokenizer, size
    self._bytes = [_bytes(tokenizer, i) for i in range(size)]
    self.longest = max(map(len, self._bytes))

  def bytes(self, index: int) -> bytes:
    """What a token stands for."""
    return self._bytes[index]

  def name(self, index: int) -> str:
    """A token as text."""
    return _name(self._bytes[index])

  def chat_logprobs(
    self, tokens: Sequence[int], logps: Sequence[float], top: Sequence[Alternatives], count: int
  ) -> list[dict[str, Any]]:
    """Entries of a chat's `logprobs.content`, with `count` alternatives each."""
    entries = []
    for i, (token, logp) in enumerate(zip(tokens, logps, strict=True)):
      entry = self._entry(token, logp)
      entry["top_logprobs"] = [self._entry(*pair) for pair in (top[i][:count] if count else ())]
      entries.append(entry)
    return entries

  def _entry(self, token: int, logp: float) -> dict[str, Any]:
    content = self._bytes[token]
    return {"token": _name(content), "logprob": max(logp, LEAST), "bytes": list(content)}

  def alternatives(self, top: Alternatives, count: int) -> dict[str, float]:
    """Alternatives of a completion's `logprobs.top_logprobs`, most probable first."""
    found: dict[str, float] = {}
    for token, logp in top[:count]:
      found.setdefault(self.name(token), max(logp, LEAST))  # of two with one name the likelier
    return found


class Offsets:
  """Where in a text tokens begin, as they come."""

  def __init__(self, vocabulary: Vocabulary):
    self._vocabulary = vocabulary
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
    self._at = 0

  def next(self, token: int) -> int:
    """Characters in front of this token."""
    content, pending = self._vocabulary.bytes(token), self._decoder.getstate()[0]
    # Bytes of a character that this token does not go on with are one character, the replacement.
    broken = bool(pending) and not 0x80 <= (content[:1] or b"\x80")[0] < 0xC0
    at = self._at + broken
    self._at += len(self._decoder.decode(content))
    return at


def _bytes(tokenizer: Tokenizer, index: int) -> bytes:
  try:
    return tokenizer.token_bytes(index)
  except ValueError:  # padding of the embedding
    return b""


@functools.lru_cache(maxsize=1 << 16)
def _name(content: bytes) -> str:
  try:
    return content.decode()
  except UnicodeDecodeError:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
