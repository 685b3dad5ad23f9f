"""A byte tokenizer: ids 0-255 are bytes, chat specials follow.

Text can never produce a special token: `encode` only emits bytes, so template tokens that a tool
prints or a user types arrive as the text they are. Specials are inserted by rome.text.chat, and by
the chat template for conversations that come as messages.
Learned vocabularies are `rome.text.bpe_tokenizer`'s.
"""

import json
import os
import pathlib
from collections.abc import Iterable

from rome.text.tokenizer import Tokenizer, read_json

SPECIALS = ("pad", "bos", "system", "user", "assistant", "tool", "call", "end")
# Messages in the shape that rome.text.chat gives to a context, for conversations that come as
# messages: encode_chat makes the same ids of it.
_TEMPLATE = """\
<|bos|>
{%- for message in messages %}
  {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
    {{- raise_exception('there is no role ' ~ message.role) }}
  {%- endif %}
  {{- '<|' ~ message.role ~ '|>' ~ message.content ~ '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|assistant|>' }}
{%- endif %}"""


class ByteTokenizer(Tokenizer):
  """UTF-8 bytes plus the chat specials, each an attribute: `tokenizer.pad`, `.bos`, ... `.end`."""

  kind = "byte"
  vocab_size = 256 + len(SPECIALS)

  pad, bos, system, user, assistant, tool, call, end = range(256, 256 + len(SPECIALS))
  specials = {f"<|{name}|>": 256 + i for i, name in enumerate(SPECIALS)}
  bos_id, eos_id = bos, end
  markup = frozenset({"<|call|>"})
  chat_templates: dict[str, str] = {"default": _TEMPLATE}
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
      out += self.token_bytes(i)
    return out.decode("utf-8", errors="replace")

  def token_bytes(self, index: int) -> bytes:
    """What one token stands for: a byte, or `<|name|>`.

    Raises:
      ValueError: the id is outside the vocabulary.
    """
    if not 0 <= index < self.vocab_size:
      raise ValueError(f"token id {index} is outside the vocabulary of {self.vocab_size}")
    return bytes([index]) if index < 256 else f"<|{SPECIALS[index - 256]}|>".encode()

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
