r"""Bytes of a sandbox as text that a model reads and a person may see.

Everything that comes out of a sandbox passes here once, at the tool that shows it, so that what the
model reads, what a terminal prints and what is stored are the same text. No control character is in
it but tab and line feed: sequences that drive a terminal go, the rest is spelled (`\x07`). So do
characters that turn the direction of writing. Special tokens of chat templates stay as they are:
they are text, and `rome.text.render` keeps them so.
"""

import os
import re

# CSI, OSC and the like (ECMA-48). Each alternative reads its text once.
_SEQUENCE = re.compile(
  r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-Z\\`-~])"
)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_ODD = re.compile("[\ud800-\udfff]")
_NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
_SPILLED = re.compile(r"\n\[\.\.\. \d+ bytes left out; [a-z ]+ is in (/\S+) \.\.\.\]\n")


def clean(text: str) -> str:
  """The text without control characters: each is spelled."""
  return _ODD.sub("\ufffd", _CONTROL.sub(_spelled, text))


def screen(text: str) -> str:
  """What a terminal would show of a command's output: no colours, of a progress bar the last."""
  lines = _SEQUENCE.sub("", text).split("\n")
  return clean("\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines))


def decode(data: bytes) -> str:
  r"""A file's bytes as text; what is no UTF-8 is spelled (`\xff`)."""
  return clean(data.decode("utf-8", "backslashreplace"))


def name(path: str) -> str:
  """A path as one word of bash where it holds what cannot be shown, else as it is."""
  if path and path.isprintable() and clean(path) == path:
    return path
  return f"$'{''.join(map(_quoted, os.fsencode(_NO_BYTE.sub(chr(0xFFFD), path))))}'"


def cut(text: str, most: int) -> tuple[str, bool]:
  """At most about `most` characters of it, head and tail, and whether something is left out."""
  if len(text) <= most:
    return text, False
  head, tail = text[: most // 2], text[len(text) - most // 2 :]
  return f"{head}\n[... {len(text) - len(head) - len(tail)} characters left out ...]\n{tail}", True


def spilled(output: str) -> str:
  """The file that has all of a command's output, where the sandbox has shortened it, else ""."""
  found = _SPILLED.search(output)
  return found[1] if found else ""


def _quoted(byte: int) -> str:
  """A byte within $'…'."""
  if chr(byte) in "\\'":
    return f"\\{chr(byte)}"
  return chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}"


def _spelled(found: re.Match[str]) -> str:
  code = ord(found[0])
  return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
