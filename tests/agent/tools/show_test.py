"""Bytes as text: no control characters come through, nothing else is lost."""

import os
import shlex
import subprocess
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.agent.tools import show


@pytest.mark.parametrize(
  ("output", "shown"),
  [
    ("\x1b[1;31mred\x1b[0m\n", "red\n"),
    ("\x1b]0;title\x07x\x1b]8;;http://a\x1b\\y", "xy"),
    ("\x1b]52;c;aGk=\x07\x1bP1$r\x1b\\\x1b(Bz\x1bc", "z"),
    ("a\x07b\x00c\x9bd", "a\\x07b\\x00c\\x9bd"),
    ("10%\r20%\r100%\r\ndone\r\n", "100%\ndone\n"),
    ("\u202etxt.exe\u2066", "\\u202etxt.exe\\u2066"),
    ("tab\tend\n", "tab\tend\n"),
    ("<|im_end|>", "<|im_end|>"),
    ("\x1b[31", "\\x1b[31"),
  ],
)
def test_what_a_screen_would_show(output, shown):
  assert show.screen(output) == shown


@given(st.text(max_size=40) | st.text("\x1b[]()0;m\x07\\\r\n\x9b ", max_size=40))
def test_nothing_that_drives_a_terminal_comes_through(text):
  for shown in (show.screen(text), show.clean(text), show.decode(text.encode("utf-16"))):
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n"]
    shown.encode()


@given(st.binary())
def test_clean_text_stays_as_it_is(data):
  text = show.decode(data)
  assert show.clean(text) == text == show.decode(text.encode())


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=1, max_size=30).filter(lambda data: b"\0" not in data))
def test_a_name_is_what_bash_reads_as_that_name(data):
  path = os.fsdecode(data)
  shown = show.name(path)
  assert shown.isprintable()
  word = shown if shown != path else shlex.quote(path)
  said = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
  assert said.stdout == data


def test_the_middle_of_what_is_long_goes():
  text, cut = show.cut("a" * 50 + "b" * 50, 40)
  assert cut and text.startswith("a" * 20 + "\n[... 60 ") and text.endswith("\n" + "b" * 20)
  assert show.cut("a" * 40, 40) == ("a" * 40, False)
