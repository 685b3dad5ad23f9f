"""Messages of the DNS server, byte by byte."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rome.envs.network import dns


def query(name, kind=1, flags=0x0100, questions=1, kind_class=1):
  labels = b"".join(bytes([len(label)]) + label for label in name.split(b".") if label)
  header = struct.pack(">6H", 0xBEEF, flags, questions, 0, 0, 0)
  return header + labels + b"\0" + struct.pack(">HH", kind, kind_class)


def test_an_address():
  question = dns.Question(query(b"Pypi.ORG"))
  assert (question.name, question.kind, question.code) == ("Pypi.ORG", 1, dns.NO_ERROR)
  answer = question.answer(dns.NO_ERROR, "127.77.0.1")
  assert answer == (
    bytes.fromhex("beef 8580 0001 0001 0000 0000") + query(b"Pypi.ORG")[12:]
    + bytes.fromhex("c00c 0001 0001 0000001e 0004 7f4d0001")
  )  # fmt: skip


def test_no_such_record_and_no_such_name():
  v6 = dns.Question(query(b"pypi.org", kind=28))
  assert v6.answer(dns.NO_ERROR, "127.77.0.1")[:12].hex() == "beef85800001000000000000"
  assert v6.answer(dns.NO_NAME)[:12].hex() == "beef85830001000000000000"


@pytest.mark.parametrize("message", [b"", b"\0" * 11, query(b"a", flags=0x8000)])
def test_what_deserves_no_answer(message):
  with pytest.raises(ValueError):
    dns.Question(message)


@pytest.mark.parametrize(
  ("message", "code"),
  [(query(b"a", questions=2), dns.FORMAT_ERROR), (query(b"a", questions=0), dns.FORMAT_ERROR),
   (query(b"a")[:-1], dns.FORMAT_ERROR), (query(b"a", flags=0x2800), dns.NOT_IMPLEMENTED),
   (query(b"a", kind_class=3), dns.NOT_IMPLEMENTED),
   (query(b"")[:12] + b"\xc0\x0c\0\1\0\1", dns.FORMAT_ERROR),
   (query(b".".join([b"x" * 60] * 5)), dns.FORMAT_ERROR)],
)  # fmt: skip
def test_questions_that_cannot_be_answered(message, code):
  question = dns.Question(message)
  assert question.code == code
  assert question.answer(code)[3] & 15 == code


@given(st.binary(max_size=600))
def test_any_bytes(message):
  try:
    question = dns.Question(message)
  except ValueError:
    return
  answer = question.answer(question.code, "127.77.0.1")
  assert answer[:2] == message[:2] and len(answer) <= len(message) + 16
