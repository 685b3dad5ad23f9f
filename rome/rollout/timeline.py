"""A timeline of a run in the Chrome trace format, which Perfetto (ui.perfetto.dev) and
chrome://tracing show.

One track for the trainer, one for the engine, one for each lane of environments; counters of rows
that run, and of devices that generate or are lent to training. Spans are kept as tuples and written
when an update ends, so that they cost microseconds where they happen; what a killed process had not
written yet is lost. The file is an array of events, one a line, whose closing bracket may be
missing. It is bounded: beyond `max_bytes` the older half goes. A run that goes on appends, with
times behind the last one.
"""

import collections
import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rome import files

TRAINER, ENGINE, LANES = 0, 1, 2  # track numbers; lane n is LANES + n
MAX_BYTES = 32 << 20
BUSY = {  # names of spans in which a track works; in the others it waits
  "trainer": ("pack", "score", "update", "checkpoint"),
  "engine": ("step",),
  "environments": ("reset", "step", "tests"),
}
_TAIL = 1 << 18  # bytes searched for the last time


class Timeline:
  """Spans and counters of one run. `span` may be called from any thread, the rest from one.

  Args:
    path: the file; None records nothing.
    lanes: environments at once.
    max_bytes: bound on the file, but for one update.
    clock: seconds from any origin.
  """

  def __init__(
    self,
    path: str | os.PathLike[str] | None,
    lanes: int = 0,
    max_bytes: int = MAX_BYTES,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._path = None if path is None else pathlib.Path(path)
    self._lanes, self._max_bytes, self.clock = lanes, max_bytes, clock
    self._events: collections.deque[tuple] = collections.deque()
    self._origin = self._marked = clock()
    if self._path is not None:
      self._file = self._open(self._path)

  def span(self, track: int, name: str, start: float, end: float, about: str = "") -> None:
    """Something took from `start` to `end` (seconds of the clock).

    Args:
      about: a few words shown with it.
    """
    if self._path is not None:
      self._events.append((track, name, start, end, about))

  def count(self, name: str, **values: int) -> None:
    """Counters at this moment."""
    if self._path is not None:
      self._events.append((ENGINE, name, self.clock(), None, values))

  @contextlib.contextmanager
  def stage(self, name: str) -> Iterator[None]:
    """The block is a span of the trainer, also when it raises."""
    start = self.clock()
    try:
      yield
    finally:
      self.span(TRAINER, name, start, self.clock())

  def mark(self, phase: str, step: int) -> None:
    """An update or an evaluation ended: writes what happened since the last mark.

    The mark tells seconds, and which share of them trainer, engine and environments did not work.
    """
    if self._path is None:
      return
    now = self.clock()
    seconds, lines = max(now - self._marked, 1e-9), []
    busy = dict.fromkeys(BUSY, 0.0)
    for _ in range(len(self._events)):  # threads go on appending
      track, name, start, end, about = self._events.popleft()
      lines.append(self._line(track, name, start, end, about))
      kind = _KINDS[min(track, LANES)]
      if end is not None and name in BUSY[kind]:
        busy[kind] += end - start
    busy["environments"] /= max(self._lanes, 1)
    idle = {f"idle_{kind}": round(max(1 - t / seconds, 0.0), 4) for kind, t in busy.items()}
    args = {"phase": phase, "step": step, "seconds": round(seconds, 4), **idle}
    about, at = json.dumps(args), self._micros(now)
    event = f'"name":"{phase} {step}","pid":1,"tid":{TRAINER},"ts":{at},"args":{about}'
    lines.append(f',{{"ph":"i","s":"g",{event}}}\n')
    self._marked = now
    files.append(self._file, "".join(lines).encode())
    if self._file.tell() > self._max_bytes:
      self._trim()

  def close(self) -> None:
    """Writes the rest and ends the array; a full disk costs both."""
    if self._path is not None and not self._file.closed:
      lines = [self._line(*self._events.popleft()) for _ in range(len(self._events))]
      # Whoever closes after an error has to hear of that one.
      with contextlib.suppress(files.WriteError):
        files.append(self._file, "".join([*lines, "]\n"]).encode())
      self._file.close()

  def _line(self, track: int, name: str, start: float, end: float | None, about: Any) -> str:
    at = self._micros(start)
    if end is None:
      values = json.dumps(about)
      return f',{{"ph":"C","name":"{name}","pid":1,"tid":{track},"ts":{at},"args":{values}}}\n'
    args = f',"args":{{"about":{json.dumps(about)}}}' if about else ""
    took = self._micros(end) - at
    return f',{{"ph":"X","name":"{name}","pid":1,"tid":{track},"ts":{at},"dur":{took}{args}}}\n'

  def _micros(self, at: float) -> int:
    return int((at - self._origin) * 1e6)

  def _header(self) -> bytes:
    names = ["trainer", "engine", *(f"environment {n}" for n in range(self._lanes))]
    lines = ['[{"ph":"M","name":"process_name","pid":1,"args":{"name":"rome"}}\n']
    for track, name in enumerate(names):
      for kind, value in (("name", f'"name":"{name}"'), ("sort_index", f'"sort_index":{track}')):
        lines.append(
          f',{{"ph":"M","name":"thread_{kind}","pid":1,"tid":{track},"args":{{{value}}}}}\n'
        )
    return "".join(lines).encode()

  def _open(self, path: pathlib.Path) -> Any:
    """The file, to append to; a new one where there is none that this class wrote."""
    with files.writing(path):
      file = open(path, "ab", buffering=0)
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if data[:end].endswith(b"\n]\n"):
      end -= 2
    if not data.startswith(b'[{"ph":"M"') or not end:
      file.truncate(0)
      files.append(file, self._header())
      return file
    file.truncate(end)
    last = 0
    for line in data[max(end - _TAIL, 0) : end].split(b"\n"):
      with contextlib.suppress(ValueError):
        event = json.loads(line[1:])
        last = max(last, event.get("ts", 0) + event.get("dur", 0))
    self._origin -= last / 1e6
    return file

  def _trim(self) -> None:
    """Keeps the newest half, from the end of an update on."""
    assert self._path is not None
    data = self._path.read_bytes()
    cut = data.find(b',{"ph":"i"', len(data) - self._max_bytes // 2)
    # Of one update that is longer than that, the mark alone.
    cut = data.find(b"\n", cut if cut >= 0 else data.rfind(b',{"ph":"i"')) + 1
    self._file.close()
    files.write_atomic(self._path, self._header() + data[cut:])
    self._file = open(self._path, "ab", buffering=0)


_KINDS = ("trainer", "engine", "environments")
NO_TIMELINE = Timeline(None)


def read_marks(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """What the marks of a timeline say, in order; lines that are no marks are passed over.

  Returns:
    Dicts with phase, step, seconds and idle_trainer, idle_engine, idle_environments (shares).
  Raises:
    OSError: the file cannot be read.
  """
  marks = []
  with open(path, "rb") as file:
    for line in file:
      if line.startswith(b',{"ph":"i"'):
        with contextlib.suppress(ValueError, KeyError):
          marks.append(json.loads(line[1:])["args"])
  return marks
