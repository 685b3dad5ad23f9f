"""Ids round-trip, text never makes a special, and a foreign directory is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rome.text import ByteTokenizer
from rome.text.byte_tokenizer import SPECIALS

TOKENIZER = ByteTokenizer()
texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(texts)
def test_text_round_trips(text):
  assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.text())
def test_text_never_makes_a_special(text):
  for sample in (text, *(f"{text}<|{name}|>{text}" for name in SPECIALS)):
    assert all(0 <= i < 256 for i in TOKENIZER.encode(sample))


def test_ids_are_bytes_and_specials_follow():
  assert TOKENIZER.encode("hé\n") == [104, 195, 169, 10]
  assert TOKENIZER.encode("<|end|>") == [60, 124, 101, 110, 100, 124, 62]
  assert [TOKENIZER.pad, TOKENIZER.bos, TOKENIZER.call, TOKENIZER.end] == [256, 257, 262, 263]
  assert TOKENIZER.vocab_size == 264


def test_specials_are_shown_by_name():
  for i, name in enumerate(SPECIALS):
    assert TOKENIZER.decode([97, 256 + i, 98]) == f"a<|{name}|>b"


def test_bytes_that_are_no_utf8_are_replaced():
  assert TOKENIZER.decode([97, 0xFF, 98]) == "a\ufffdb"
  # A special between the two bytes of a character does not glue them together.
  assert TOKENIZER.decode([0xC3, TOKENIZER.end, 0xA9]) == "\ufffd<|end|>\ufffd"


def test_an_unpaired_surrogate_does_not_raise():
  assert TOKENIZER.encode("a\ud800b") == TOKENIZER.encode("a?b")


@pytest.mark.parametrize("token", [-1, 264, 10**9])
def test_ids_outside_the_vocabulary_are_refused(token):
  with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary of 264"):
    TOKENIZER.decode([97, token])


def test_save_and_from_dir(tmp_path):
  TOKENIZER.save(tmp_path)
  again = ByteTokenizer.from_dir(tmp_path)
  assert again.decode(again.encode("x")) == "x" and again.vocab_size == TOKENIZER.vocab_size


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "no readable tokenizer at .*rome_tokenizer.json"),
    ("{", "no readable tokenizer at .*rome_tokenizer.json"),
    (json.dumps({"kind": "bpe", "specials": list(SPECIALS)}), "another tokenizer"),
    (json.dumps({"kind": "byte", "specials": ["pad"]}), "another tokenizer"),
    ("[]", "another tokenizer"),
  ],
)
def test_from_dir_refuses_what_it_does_not_know(tmp_path, content, message):
  if content is not None:
    (tmp_path / "rome_tokenizer.json").write_text(content)
  with pytest.raises(ValueError, match=message):
    ByteTokenizer.from_dir(tmp_path)
