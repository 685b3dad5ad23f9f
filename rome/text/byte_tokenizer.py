"""A byte tokenizer: ids 0-255 are bytes, chat specials follow.

Text can never produce a special token: `encode` only emits bytes, so template tokens that a tool
prints or a user types arrive as the text they are. Specials are inserted by rome.text.chat alone.
Learned vocabularies are `rome.text.bpe_tokenizer`'s.
"""

import json
import os
import pathlib
from collections.abc import Iterable

from rome.text.tokenizer import Tokenizer, read_json

SPECIALS = ("pad", "bos", "system", "user", "assistant", "tool", "call", "end")


class ByteTokenizer(Tokenizer):
  """UTF-8 bytes plus the chat specials, each an attribute: `tokenizer.pad`, `.bos`, ... `.end`."""

  kind = "byte"
  vocab_size = 256 + len(SPECIALS)

  pad, bos, system, user, assistant, tool, call, end = range(256, 256 + len(SPECIALS))
  specials = {f"<|{name}|>": 256 + i for i, name in enumerate(SPECIALS)}
  bos_id, eos_id = bos, end
  # Its template is `rome.text.chat`, which never passes through text.
  chat_templates: dict[str, str] = {}
  template_variables: dict[str, str] = {}

  def encode(self, text: str) -> list[int]:
    """Token ids of `text`: its UTF-8 bytes and never a special id."""
    return list(text.encode("utf-8", errors="replace"))

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`; specials read `<|name|>`, invalid UTF-8 becomes U+FFFD.

    Raises:
      ValueError: an id is outside the vocabulary.
    """
    out = bytearray()
    for i in ids:
      if not 0 <= i < self.vocab_size:
        raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
      out += bytes([i]) if i < 256 else f"<|{SPECIALS[i - 256]}|>".encode()
    return out.decode("utf-8", errors="replace")

  def save(self, path: str | os.PathLike) -> None:
    """Writes `path`/rome_tokenizer.json."""
    file = pathlib.Path(path) / "rome_tokenizer.json"
    file.write_text(json.dumps({"kind": self.kind, "specials": SPECIALS}) + "\n")

  @classmethod
  def from_dir(cls, path: str | os.PathLike) -> "ByteTokenizer":
    """The tokenizer saved in `path`.

    Raises:
      ValueError: there is none, or it is of another kind.
    """
    file = pathlib.Path(path) / "rome_tokenizer.json"
    spec = read_json(file)
    if spec != {"kind": cls.kind, "specials": list(SPECIALS)}:
      raise ValueError(
        f"{file} describes another tokenizer than the byte tokenizer of this version"
      )
    return cls()
