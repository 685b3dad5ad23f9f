"""Diffs that are shown: what they say, and that no file makes them take for ever."""

import random

from hypothesis import given
from hypothesis import strategies as st

from rome.agent.cli import conversation
from rome.agent.cli.conversation import diff

LINES = st.lists(st.sampled_from(["a", "b", "c", "@@ -1 +1 @@", "-x", ""]), max_size=30)


def applied(old, text):
  """What a diff makes of lines."""
  found, at = [], 0
  for one in text.split("\n")[2:] if text else ():
    if one.startswith("@@"):
      first, _, count = one.split()[1][1:].partition(",")
      begin = int(first) - (count != "0")
      found, at = found + old[at:begin], begin
    elif one.startswith("+"):
      found.append(one[1:])
    else:
      assert old[at] == one[1:]
      at += 1
      found += [] if one.startswith("-") else [one[1:]]
  return found + old[at:]


@given(LINES, LINES, LINES, st.booleans())
def test_a_diff_makes_the_one_of_the_other(ends, old, new, long):
  old, new = ["0", *ends, *old, *ends, "9"], ["0", *ends, *new, *ends, "9"]
  before = conversation._MAX_SEARCHED
  conversation._MAX_SEARCHED = 3 if long else before
  try:
    text = diff("\n".join(old).encode(), "\n".join(new).encode(), "f")
  finally:
    conversation._MAX_SEARCHED = before
  assert applied(old, text) == new and (text == "") == (old == new)


def test_files_on_which_difflib_takes_hours():
  seed = random.Random(0)
  old, new = (
    "".join(f"{seed.randrange(110)}\n" for _ in range(300_000)).encode() for _ in range(2)
  )
  assert diff(old, new, "f").count("\n") > 500_000
