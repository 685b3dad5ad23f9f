"""The text of a reply while it is being sampled, and where a stop string ends it."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what an unfinished character decodes to
_LONGEST_CHARACTER = 8  # tokens after which a character counts as damaged, not unfinished


class TextStream:
  """Decodes tokens as they come.

  A token's text can depend on its neighbours (bytes of one character, spaces), so each is decoded
  together with the few in front of it, as in vLLM's incremental detokenizer.

  Args:
    decode: token ids -> text.
    stops: strings that end the text, none of them empty.
  Attributes:
    text: so far, unfinished characters left out; up to the stop string once there was one.
    stopped: whether a stop string occurred.
  """

  def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]):
    self._decode, self._stops = decode, stops
    self._tokens: list[int] = []
    self._start = self._read = 0  # tokens that are decoded again; tokens whose text is out
    self._given = 0  # characters that `take` has handed out
    self.text, self.stopped = "", False

  def push(self, token: int) -> bool:
    """Takes one token; whether a stop string is complete."""
    self._tokens.append(token)
    before = self._decode(self._tokens[self._start : self._read])
    now = self._decode(self._tokens[self._start :])
    unfinished = now.endswith(_REPLACEMENT)
    if unfinished and len(self._tokens) - self._read < _LONGEST_CHARACTER:
      return False
    self._start, self._read = self._read, len(self._tokens)
    return self._append(now[len(before) :])

  def finish(self) -> None:
    """No more tokens come: unfinished characters are what they decode to."""
    if not self.stopped and self._read < len(self._tokens):
      before = self._decode(self._tokens[self._start : self._read])
      self._append(self._decode(self._tokens[self._start :])[len(before) :])
      self._read = len(self._tokens)
    self._stops = ()

  def _append(self, new: str) -> bool:
    longest = max(map(len, self._stops), default=0)
    first = max(0, len(self.text) - longest + 1)
    self.text += new
    found = [at for stop in self._stops if (at := self.text.find(stop, first)) >= 0]
    if found:
      self.text, self.stopped = self.text[: min(found)], True
    return self.stopped

  def take(self) -> str:
    """New text that is certain: what may begin a stop string is held back until `finish`."""
    end = len(self.text)
    if not self.stopped:
      end -= max((_overlap(self.text, stop) for stop in self._stops), default=0)
    new, self._given = self.text[self._given : end], max(end, self._given)
    return new


def _overlap(text: str, stop: str) -> int:
  """How long the longest end of `text` is that `stop` begins with, short of the whole stop."""
  for length in range(min(len(text), len(stop) - 1), 0, -1):
    if text.endswith(stop[:length]):
      return length
  return 0
