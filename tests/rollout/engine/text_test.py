"""Text of tokens that come one by one: characters, stop strings, what is held back."""

import random

import pytest

from rome.rollout.engine.text import TextStream
from rome.text import ByteTokenizer
from tests.pretrained import smollm2_gguf

T = ByteTokenizer()


def run(text, stops=(), tokenizer=T):
  stream, pieces = TextStream(tokenizer.decode, stops), []
  for token in tokenizer.encode(text):
    stopped = stream.push(token)
    pieces.append(stream.take())
    if stopped:
      break
  stream.finish()
  pieces.append(stream.take())
  assert "".join(pieces) == stream.text
  return stream, pieces


def test_characters_of_several_bytes_come_whole():
  stream, pieces = run("aé漢🙂z")
  assert stream.text == "aé漢🙂z" and not stream.stopped
  assert [p for p in pieces if p] == ["a", "é", "漢", "🙂", "z"]


def test_an_unfinished_character_is_damaged_at_the_end():
  stream = TextStream(T.decode, ())
  stream.push(T.encode("é")[0])
  assert stream.take() == ""
  stream.finish()
  assert stream.take() == stream.text == "\ufffd"


def test_bytes_that_are_no_character_do_not_hold_the_rest_back_for_ever():
  stream = TextStream(T.decode, ())
  bad = T.encode("é")[1]
  for _ in range(40):
    stream.push(bad)
  assert len(stream.take()) > 20


def test_a_stop_string_ends_the_text_in_front_of_it():
  stream, pieces = run("hello STOP world", ["STOP", "zzz"])
  assert stream.stopped and stream.text == "hello "
  assert all("S" not in piece for piece in pieces)


def test_the_first_of_several_stops_counts():
  assert run("one two three", ["three", "two"])[0].text == "one "
  assert run("abcd", ["cd", "bcd"])[0].text == "a"


def test_what_may_begin_a_stop_is_held_back_until_it_does_not():
  stream = TextStream(T.decode, ["\n\nUser:"])
  seen = []
  for token in T.encode("a\n\nUse it"):
    stream.push(token)
    seen.append(stream.take())
  assert seen == ["a", "", "", "", "", "", "\n\nUse ", "i", "t"]


def test_a_stop_that_never_completes_is_text():
  assert run("a\n\nUser", ["\n\nUser:"])[0].text == "a\n\nUser"


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_the_text_up_to_the_stop(seed):
  rng = random.Random(seed)
  text = "".join(rng.choice(["a", "b", "é", "漢", "🙂", " ", "\n"]) for _ in range(60))
  stops = ["".join(rng.choice("ab é") for _ in range(rng.randint(1, 3))) for _ in range(2)]
  stream, _ = run(text, stops)
  ends = [text.find(stop) for stop in stops if stop in text]
  # The first stop to be complete; of those that end together the one that begins first.
  if not ends:
    assert stream.text == text
  else:
    complete = min(text.find(s) + len(s) for s in stops if s in text)
    assert (
      stream.stopped
      and stream.text
      == text[: min(text.find(s) for s in stops if s in text and text.find(s) + len(s) == complete)]
    )


@pytest.mark.slow
def test_byte_level_bpe():
  from rome.text import Tokenizer

  tokenizer = Tokenizer.from_dir(smollm2_gguf())
  text = "Grüße, 世界! 🙂🙂  def f(x):\n\treturn x**2  # done"
  assert run(text, tokenizer=tokenizer)[0].text == text
  assert run(text, ["return"], tokenizer)[0].text == text[: text.index("return")]
