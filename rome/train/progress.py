"""Progress that a person can read: a bar on a terminal, lines now and then in a file.

  IPA 24/120, 20:40 left, success 0.63, loss 0.012, 931 tok/s sampled, 4100 tok/s trained

What a narrow terminal cuts off is at the end. The time left is of updates alone, and does not know
of the evaluation that follows.
"""

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 20.0
_BAR = "{desc} {n_fmt}/{total_fmt} |{bar:10}| {remaining} left{postfix}"


class Progress:
  """The updates of one stage, told on standard error. A context manager.

  Args:
    name: of the stage.
    total: updates of the stage.
    done: of them, those of earlier starts.
  """

  def __init__(self, name: str, total: int, done: int):
    self._name, self._total, self._done = name, total, done
    # The first update compiles, so that rates begin behind it.
    self._first: tuple[int, float] | None = None
    self._told = 0.0
    self._bar: tqdm | None = None
    if sys.stderr.isatty():
      self._bar = tqdm(
        total=total, initial=done, desc=name, bar_format=_BAR, dynamic_ncols=True, file=sys.stderr
      )

  def update(self, **figures: str) -> None:
    """One more update is done; `figures` are what it says of itself, the most important first."""
    text = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())
    self._done += 1
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update()
      return
    now = time.monotonic()
    if self._first is None or self._done == self._total or now - self._told >= LINE_SECONDS:
      left = self._left(now)
      tqdm.write(f"{self._name} {self._done}/{self._total}, {left} left, {text}", file=sys.stderr)
      self._told = now
    self._first = self._first or (self._done, now)

  def _left(self, now: float) -> str:
    """The time left as [h:]mm:ss; a question mark before there is a rate."""
    if self._first is None:
      return "?"
    done, then = self._first
    return tqdm.format_interval((self._total - self._done) * (now - then) / (self._done - done))

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_: object) -> None:
    if self._bar is not None:
      self._bar.close()
