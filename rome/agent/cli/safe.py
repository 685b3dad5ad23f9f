r"""Text that may be shown in a terminal: whatever it holds, it is only read, never obeyed.

Model output, tool output and names of files are data. Control characters, those of C1 and those
that turn the direction of writing are shown spelled (`\x1b`, `\u202e`); tabs and line feeds stay,
what lies before a lone carriage return is not hidden by it.
"""

import re
import unicodedata

_KEPT = "\n\t"
_PLAIN = re.compile(r"[\t\n\x20-\x7e]*")
# Beside category Cf (bidi controls, what has no width, tags): ends of lines, and what is
# unassigned or a letter and blank. Variation is left alone.
_HIDING = frozenset(
  [0x2028, 0x2029, 0x115F, 0x1160, 0x3164, 0xFFA0, *range(0x2060, 0x2070), *range(0xE0000, 0xE0080)]
)


def safe(text: str) -> str:
  """The text with everything spelled that a terminal could obey or that hides or turns text."""
  if _PLAIN.fullmatch(text):
    return text
  return "".join(map(_spelled, text.replace("\r\n", "\n")))


def line(text: str, most: int = 200) -> str:
  """The same as one line of at most so many characters."""
  text = safe(text).replace("\n", "\\n").replace("\t", " ")
  return text if len(text) <= most else text[: most - 1] + "…"


def _spelled(c: str) -> str:
  if c in _KEPT:
    return c
  number = ord(c)
  if number in _HIDING or unicodedata.category(c) in ("Cc", "Cf", "Cs"):
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
  return c
