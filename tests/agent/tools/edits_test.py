"""Edits against a plain model of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rome.agent.tools.edits import replace, replace_all
from rome.agent.workspace import MAX_FILE, Refused

TEXT = st.text("ab\n\udcff", max_size=12)
EDIT = st.fixed_dictionaries(
  {"old": st.text("ab\n\udcff", max_size=3), "new": st.text("ab\n", max_size=3)},
  optional={"all": st.booleans()},
)


def places(text, old):
  return [i for i in range(len(text)) if text.startswith(old, i)]


def model(text, edits):
  """What the edits make of the text, None where one cannot be made."""
  for edit in edits:
    old, new, found = edit["old"], edit["new"], places(text, edit["old"])
    if not old or old == new or not found or (len(found) > 1 and not edit.get("all")):
      return None
    if edit.get("all"):
      text = new.join(text.split(old))
    else:
      text = text[: found[0]] + new + text[found[0] + len(old) :]
  return text


def made(text, edits):
  try:
    return replace_all(text, edits)[0]
  except Refused:
    return None


@given(TEXT, st.lists(EDIT, min_size=1, max_size=4))
def test_edits_are_those_of_the_model(text, edits):
  assert made(text, edits) == model(text, edits)


@given(TEXT.filter(lambda text: "\n" in text), EDIT)
def test_line_ends_of_windows_are_kept(text, edit):
  """Text with plain line feeds matches, and what comes in has the ends that the file has."""
  plain = made(text, [edit])
  wanted = None if plain is None else plain.replace("\n", "\r\n")
  assert made(text.replace("\n", "\r\n"), [edit]) == wanted


@pytest.mark.parametrize(
  ("text", "old", "says"),
  [
    ("aaa", "aa", "found 2 times (first in line 1)"),
    ("x\nx\nx\n", "x", "found 3 times"),
    ("a" * 5000, "a", "found 1000 or more times"),
    ("", "a", "not found"),
    ("if x:\n\treturn\n", "if x:\n  return", "line 1 differs from it in white space only"),
    ("one\ntwo\n", "1\tone\n2\ttwo", "leave out the line numbers"),
    ("one", "", "old is empty"),
    ("one", "new", "old and new are the same"),
  ],
)
def test_an_edit_that_cannot_be_made_says_what_to_do(text, old, says):
  with pytest.raises(Refused) as error:
    replace(text, old, "new")
  assert says in str(error.value)


def test_a_refusal_names_the_edit_and_that_nothing_was_changed():
  edits = [{"old": "a", "new": "b"}, {"old": "a", "new": "c"}]
  with pytest.raises(Refused, match="edit 2 of 2: old was not found.*nothing was changed"):
    replace_all("a", edits)


def test_an_edit_cannot_blow_a_file_up():
  with pytest.raises(Refused, match="larger than 16 MiB"):
    replace("a" * (1 << 20), "a", "b" * MAX_FILE, everywhere=True)
