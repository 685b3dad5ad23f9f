"""What every tokenizer can do, and where one comes from.

Kinds: bytes (`rome.text.byte_tokenizer`) and byte-level BPE (`rome.text.bpe_tokenizer`), the latter
from a `tokenizer.json` or from inside a GGUF file. Left out: SentencePiece, Unigram.
"""

import abc
import importlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any, ClassVar

# Checkpoints pad the embedding to round sizes: Qwen3 by 267 rows, DeepSeek by 465.
MAX_PADDING = 1024
# A file in a directory -> module and class of the tokenizer it describes.
_FILES = {
  "rome_tokenizer.json": ("rome.text.byte_tokenizer", "ByteTokenizer"),
  "tokenizer.json": ("rome.text.bpe_tokenizer", "BPETokenizer"),
}


class Tokenizer(abc.ABC):
  """Text to token ids and back.

  Attributes:
    kind: name of the kind.
    vocab_size: ids are 0..vocab_size - 1.
    specials: content of a token that only templates write, such as "<|im_end|>", -> its id.
    markup: those of `specials` that a model may also write in its reply's text, such as "<think>".
    strips_left, strips_right: those of `specials` that take the white space on that side along.
    bos_id, eos_id: begins a text, ends one (None where the tokenizer names none).
    chat_templates: name -> jinja source; "default" unless the checkpoint names several.
    template_variables: what templates may read beside the messages, such as "bos_token".
  """

  kind: ClassVar[str]
  vocab_size: int
  specials: dict[str, int]
  markup: frozenset[str] = frozenset()
  strips_left: frozenset[str] = frozenset()
  strips_right: frozenset[str] = frozenset()
  bos_id: int | None
  eos_id: int | None
  chat_templates: dict[str, str]
  template_variables: dict[str, str]

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Token ids of `text`, none of them in `specials`, whatever the text says."""

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`, specials as their content; invalid UTF-8 becomes U+FFFD.

    Raises:
      ValueError: an id is outside the vocabulary.
    """

  @abc.abstractmethod
  def token_bytes(self, index: int) -> bytes:
    """What one token stands for; those of a character that takes several tokens are no UTF-8.

    Raises:
      ValueError: the id is outside the vocabulary.
    """

  @abc.abstractmethod
  def save(self, path: str | os.PathLike) -> None:
    """Writes what `from_dir` reads into the directory `path`."""

  @classmethod
  def from_dir(cls, path: str | os.PathLike) -> "Tokenizer":
    """The tokenizer of a checkpoint: a directory, or a GGUF file.

    Raises:
      ValueError: there is none, it is damaged, or of a kind that is not supported.
    """
    path = pathlib.Path(path)
    names = {name: where for name, where in _FILES.items() if (path / name).is_file()}
    if path.suffix == ".gguf":
      names = {path.name: ("rome.text.bpe_tokenizer", "BPETokenizer")}
    if len(names) != 1:
      found = " and ".join(names) or "neither"
      raise ValueError(f"{path} has {found}: want one of {', '.join(_FILES)}, or a path to a .gguf")
    ((module, kind),) = names.values()
    return getattr(importlib.import_module(module), kind).from_dir(path)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Checks a tokenizer against a model's vocabulary.

  Choice: a model may have up to `MAX_PADDING` rows more than the tokenizer has ids.

  Args:
    tokenizer: the tokenizer.
    vocab_size: `ModelConfig.vocab_size`.
  Raises:
    ValueError: some ids have no row, or more rows than padding explains have no id.
  """
  padding = vocab_size - tokenizer.vocab_size
  if not 0 <= padding <= MAX_PADDING:
    raise ValueError(
      f"tokenizer/vocabulary mismatch: the {tokenizer.kind} tokenizer has {tokenizer.vocab_size} "
      f"ids, the model {vocab_size} rows (it may have up to {MAX_PADDING} more); give the model's "
      "own tokenizer"
    )


def read_json(file: pathlib.Path) -> Any:
  """The JSON in `file`.

  Raises:
    ValueError: it cannot be read; the message names it.
  """
  try:
    return json.loads(file.read_text())
  except (OSError, RecursionError, ValueError) as e:
    raise ValueError(f"no readable tokenizer at {file}: {e}") from None
