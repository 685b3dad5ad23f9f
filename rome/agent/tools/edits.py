"""Exact replacements in a text: the work of `edit` and `multi_edit`, without a sandbox.

A text that is to be replaced must be there exactly once, or all of its places are meant. Where it
is not there, the error says what is nearly so: other white space, line numbers that belong to the
display. Where all lines of a file end in CRLF, line feeds of old and new stand for CRLF.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rome.agent.workspace import MAX_FILE, Refused

_LARGE = 1 << 20  # characters beyond which nothing similar is looked for
_NUMBERED = re.compile(r"^ *\d+\t", re.MULTILINE)


def replace_all(text: str, edits: Sequence[Mapping[str, Any]]) -> tuple[str, list[int]]:
  """Makes edits one after another, each in what the one before it left; all or none.

  Args:
    text: the file.
    edits: `old`, `new`, and `all` where every place is meant.
  Returns:
    The new text, and the line where each edit's first place was when it was made.
  Raises:
    Refused: one of them cannot be made; the message says which and why.
  """
  lines = []
  for i, edit in enumerate(edits):
    try:
      text, line = replace(text, edit["old"], edit["new"], edit.get("all", False))
    except Refused as error:
      where = f"edit {i + 1} of {len(edits)}: " if len(edits) > 1 else ""
      raise Refused(f"{where}{error}; nothing was changed") from error
    lines.append(line)
  return text, lines


def replace(text: str, old: str, new: str, everywhere: bool = False) -> tuple[str, int]:
  """One edit; see `replace_all`."""
  if not old:
    raise Refused("old is empty; give the text to replace, or use write")
  if old == new:
    raise Refused("old and new are the same")
  if "\r" not in old + new and 0 < text.count("\n") == text.count("\r\n"):
    old, new = old.replace("\n", "\r\n"), new.replace("\n", "\r\n")
  first = text.find(old)
  if first < 0:
    raise Refused(f"old was not found{_nearly(text, old)}")
  if not everywhere and text.find(old, first + 1) >= 0:
    raise Refused(
      f"old was found {_count(text, old)} times (first in line {_line(text, first)}): "
      "add lines around it so that it is unique, or set all"
    )
  places = text.count(old) if everywhere else 1
  if len(text) + places * (len(new) - len(old)) > MAX_FILE:
    raise Refused(f"the file would be larger than {MAX_FILE >> 20} MiB")
  return text.replace(old, new), _line(text, first)


def _line(text: str, at: int) -> int:
  return text.count("\n", 0, at) + 1


def _count(text: str, old: str, most: int = 1000) -> str:
  """How often it is there, places that overlap counted each."""
  count, at = 0, text.find(old)
  while at >= 0 and count < most:
    count, at = count + 1, text.find(old, at + 1)
  return str(count) if count < most else f"{most} or more"


def _nearly(text: str, old: str) -> str:
  """What to do about a text that is not there."""
  if _NUMBERED.search(old) and (plain := _NUMBERED.sub("", old)) in text and plain:
    return ": leave out the line numbers that read shows in front of lines"
  if len(text) > _LARGE:
    return ""
  wanted = [line.strip() for line in old.strip().split("\n")]
  lines = [line.strip() for line in text.split("\n")]
  if wanted == [""]:
    return ""
  at = -1
  try:
    for _ in range(100):
      at = lines.index(wanted[0], at + 1)
      if lines[at : at + len(wanted)] == wanted:
        return f": line {at + 1} differs from it in white space only; read it again"
  except ValueError:
    pass
  return "; it must be the file's text exactly, white space included"
