"""Text for a terminal: nothing in it is obeyed, and what can be read stays readable."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rome.agent.cli.safe import line, safe


@given(st.text(st.characters(exclude_categories=[])))
def test_no_control_character_is_left(text):
  shown = safe(text)
  assert all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") for c in shown)
  assert not set(shown) & set("\u200b\u200f\u202a\u202e\u2066\u2069\u061c\ufeff\u2028")
  assert safe(shown) == shown and len(line(text)) <= 200 and "\n" not in line(text)


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    ("\x1b[2J\x1b]52;c;aGk=\x07", "\\x1b[2J\\x1b]52;c;aGk=\\x07"),
    ("safe\rrm -rf", "safe\\x0drm -rf"),
    ("dos\r\nlines", "dos\nlines"),
    ("\x9b31m", "\\x9b31m"),
    ("a\u202eb", "a\\u202eb"),
    ("Grüße, 世界 👍\ttab", "Grüße, 世界 👍\ttab"),
  ],
)
def test_what_is_shown(text, shown):
  assert safe(text) == shown
