"""Byte-level BPE tokenizers: a Hugging Face `tokenizer.json`, or the vocabulary inside a GGUF file.

Both become one specification, the content of a `tokenizer.json`, which the library `tokenizers`
runs.

Text can never produce a special token. The library would match the content of added tokens in any
text, so it is given a vocabulary where they have other names: their ids are out of its reach, and
a vocabulary whose merges could still build one is refused. `rome.text.templates` inserts them.
Choice: that holds for all added tokens, also those that a checkpoint does not call special
("<think>", "<tool_call>"); added tokens of white space alone, as some vocabularies have, are text.

Bytes that the vocabulary has no token for are left out, as transformers does: SmolLM2 lacks six
control characters. Left out: vocabularies that are not byte-level (SentencePiece, Unigram,
WordPiece), added tokens that match whole words only.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rome.text.gguf_file import GGUF, read_gguf
from rome.text.tokenizer import Tokenizer, read_json

if TYPE_CHECKING:
  import tokenizers

# Named tokens that transformers passes to templates.
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def _byte_level(use_regex: bool) -> dict:
  return {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": use_regex,
  }


def _split(pattern: str, then: dict) -> dict:
  split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
  return {"type": "Sequence", "pretokenizers": [split, then]}


_QWEN2 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2: dict[str, Any] = {"pre_tokenizer": _byte_level(True), "normalizer": None}
_DIGITS: dict[str, Any] = {"pre_tokenizer": _split(r"\p{N}", _byte_level(True)), "normalizer": None}
_LLAMA3: dict[str, Any] = {
  "pre_tokenizer": _split(_QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"), _byte_level(False)),
  "normalizer": None,
  "ignore_merges": True,
}
# `tokenizer.ggml.pre` -> how the checkpoint's own tokenizer.json splits text before merging.
_PRE: dict[str, dict[str, Any]] = {
  **dict.fromkeys(("default", "gpt-2", "olmo", "mpt"), _GPT2),
  **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
  **dict.fromkeys(("llama3", "llama-v3", "llama-bpe"), _LLAMA3),
  "qwen2": {
    "pre_tokenizer": _split(_QWEN2, _byte_level(False)),
    "normalizer": {"type": "NFC"},
  },
}
_CONTROL, _USER_DEFINED = 3, 4  # values of `tokenizer.ggml.token_type`


def _byte_alphabet() -> dict[str, int]:
  """The characters that byte-level vocabularies write bytes with (GPT-2's `bytes_to_unicode`)."""
  shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  hidden = [byte for byte in range(256) if byte not in shown]
  return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTES = _byte_alphabet()


def _added(index: int, content: str, special: bool) -> dict:
  plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  return {"id": index, "content": content, "special": special, **plain}


def _gguf_specification(file: GGUF) -> tuple[dict, dict]:
  """A GGUF file's tokenizer as the contents of tokenizer.json and tokenizer_config.json."""
  prefix = "tokenizer.ggml."
  meta = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
  if meta.get("model") != "gpt2":
    raise ValueError(f"tokenizer {meta.get('model')!r} is not supported, byte-level BPE (gpt2) is")
  pre = meta.get("pre", "default")
  if pre not in _PRE:
    known = ", ".join(sorted(_PRE))
    raise ValueError(f"pre-tokenizer {pre!r} is not supported; these are: {known}")
  tokens, types = meta["tokens"], meta["token_type"]
  if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
    raise ValueError("tokenizer.ggml.tokens has duplicates or another length than token_type")
  model = {
    "type": "BPE",
    "vocab": {token: i for i, token in enumerate(tokens)},
    "merges": [merge.split(" ", 1) for merge in meta["merges"]],
    "ignore_merges": _PRE[pre].get("ignore_merges", False),
  }
  added = [
    _added(i, token, kind == _CONTROL)
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
    if kind in (_CONTROL, _USER_DEFINED)
  ]
  names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "seperator": "sep"}
  config = {
    f"{ours}_token": tokens[meta[f"{theirs}_token_id"]]
    for theirs, ours in names.items()
    if f"{theirs}_token_id" in meta
  }
  if "tokenizer.chat_template" in file.metadata:
    config["chat_template"] = file.metadata["tokenizer.chat_template"]
  decoder = _byte_level(True)
  spec = {"version": "1.0", "added_tokens": added, "decoder": decoder, "model": model}
  return {**spec, **{k: _PRE[pre][k] for k in ("normalizer", "pre_tokenizer")}}, config


def _types(part: Any) -> set[str]:
  """Types of a normaliser, pre-tokenizer or decoder and of those it is made of."""
  if isinstance(part, list):
    return set().union(*(_types(p) for p in part))
  if not isinstance(part, dict):
    return set()
  return {str(part.get("type"))}.union(*(_types(v) for v in part.values()))


def _without_specials(spec: dict, specials: dict[str, int]) -> dict:
  """The specification of a tokenizer that can never give an id in `specials`."""
  model = spec["model"]
  # Names outside the byte alphabet: no text comes to read like this.
  vocab = {
    f"\ue000{i}" if token in specials else token: i
    for token, i in itertools.chain(
      model["vocab"].items(), ((t["content"], t["id"]) for t in spec["added_tokens"])
    )
  }
  kept = [t for t in spec["added_tokens"] if t["content"] not in specials]
  off = dict.fromkeys(("truncation", "padding", "post_processor"))
  model = {**model, "vocab": vocab, "unk_token": None}
  return {**spec, **off, "model": model, "added_tokens": kept}


class BPETokenizer(Tokenizer):
  """A byte-level BPE vocabulary with its added tokens and chat templates."""

  kind = "BPE"

  def __init__(self, spec: dict, config: dict):
    """From the contents of a tokenizer.json and a tokenizer_config.json.

    Raises:
      ValueError, KeyError, TypeError: they are damaged or not supported.
    """
    import tokenizers  # here, so that who only needs bytes does not load it

    parts = _types(spec["decoder"]) & _types(spec["pre_tokenizer"])
    if spec["model"]["type"] != "BPE" or "ByteLevel" not in parts:
      raise ValueError(f"a {spec['model']['type']} vocabulary is not supported, byte-level BPE is")
    self._spec, self._config = spec, config
    added = [t for t in spec["added_tokens"] if not t["content"].isspace()]
    for token in added:
      if token.get("single_word") or len(token["content"]) < 2:
        raise ValueError(
          f"added token {token['content']!r} is not supported: a whole word, or one character"
        )
    self.specials = {t["content"]: t["id"] for t in added}
    self.markup = frozenset(t["content"] for t in added if not t["special"])
    self.strips_left = frozenset(t["content"] for t in added if t.get("lstrip"))
    self.strips_right = frozenset(t["content"] for t in added if t.get("rstrip"))
    self._names = {i: content for content, i in self.specials.items()}
    plain = _without_specials(spec, self.specials)
    self._plain = _tokenizer(tokenizers, plain)
    self.vocab_size = max(plain["model"]["vocab"].values()) + 1
    self.template_variables = {
      name: config[name]["content"] if isinstance(config[name], dict) else config[name]
      for name in _NAMED
      if config.get(name) is not None
    }
    self.bos_id, self.eos_id = self._named_id("bos_token"), self._named_id("eos_token")
    self.chat_templates = _templates(config.get("chat_template"))

  def _named_id(self, name: str) -> int | None:
    content = self.template_variables.get(name)
    if content is None:
      return None
    index = self.specials.get(content, self._plain.token_to_id(content))
    if index is None:
      raise ValueError(f"{name} {content!r} is not in the vocabulary")
    return index

  def encode(self, text: str) -> list[int]:
    """Token ids of `text`, none of them in `specials`, whatever the text says."""
    # A lone surrogate is no character; it becomes "?", as in the byte tokenizer.
    text = text.encode("utf-8", errors="replace").decode()
    return self._plain.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`, specials as their content; invalid UTF-8 becomes U+FFFD.

    Raises:
      ValueError: an id is outside the vocabulary.
    """
    out = []
    for special, group in itertools.groupby(map(int, ids), lambda i: i in self._names):
      run = list(group)
      if special:
        out += [self._names[i] for i in run]
        continue
      for i in run:
        if not 0 <= i < self.vocab_size or self._plain.id_to_token(i) is None:
          raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
      out.append(self._plain.decode(run, skip_special_tokens=False))
    return "".join(out)

  def token_bytes(self, index: int) -> bytes:
    """What one token stands for; those of a character that takes several tokens are no UTF-8.

    Raises:
      ValueError: the id is outside the vocabulary.
    """
    content = self._names.get(index)
    if content is not None:
      return content.encode()
    token = self._plain.id_to_token(index) if 0 <= index < self.vocab_size else None
    if token is None:
      raise ValueError(f"token id {index} is outside the vocabulary of {self.vocab_size}")
    if all(c in _BYTES for c in token):
      return bytes(map(_BYTES.__getitem__, token))
    return token.encode()  # an added token of white space

  def save(self, path: str | os.PathLike) -> None:
    """Writes `path`/tokenizer.json and tokenizer_config.json, which transformers reads too."""
    path = pathlib.Path(path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config}
    for name, content in {"tokenizer": self._spec, "tokenizer_config": config}.items():
      (path / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False) + "\n")

  @classmethod
  def from_dir(cls, path: str | os.PathLike) -> "BPETokenizer":
    """The tokenizer in the directory or GGUF file `path`.

    Raises:
      ValueError: there is none, it is damaged, or of a kind that is not supported.
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
      file = read_gguf(path)
    try:
      if path.suffix == ".gguf":
        return cls(*_gguf_specification(file))
      config_file, jinja = path / "tokenizer_config.json", path / "chat_template.jinja"
      config = read_json(config_file) if config_file.exists() else {}
      if jinja.exists():  # where both are there, transformers reads this one
        config["chat_template"] = jinja.read_text()
      return cls(read_json(path / "tokenizer.json"), config)
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as e:
      what = f"missing {e}" if isinstance(e, KeyError) else e
      raise ValueError(f"{path}: no usable tokenizer: {what}") from None


def _templates(found: str | list | None) -> dict[str, str]:
  """A checkpoint has no template, one, or several with names."""
  if isinstance(found, list):
    return {t["name"]: t["template"] for t in found}
  return {"default": found} if found else {}


def _tokenizer(tokenizers: Any, spec: dict) -> "tokenizers.Tokenizer":
  try:
    found = tokenizers.Tokenizer.from_str(json.dumps(spec))
  except Exception as e:  # the library raises plain Exception
    raise ValueError(
      f"the vocabulary is damaged, or its merges build a special token out of text: {e}"
    ) from None
  for token in spec["added_tokens"]:
    if found.token_to_id(token["content"]) != token["id"]:
      raise ValueError(f"added token {token['content']!r} has no id of its own")
  return found
