"""Metrics on disk and where the time went.

A run's numbers are rows of JSON Lines, flushed one at a time, so that a killed run keeps what it
measured. TensorBoard files are a view of those rows: on a resume they are rebuilt from them instead
of being patched.

Two synchronous runs of one seed on one machine write the same rows, apart from `CLOCK`.

Other trackers follow the file (`rome.train.trackers`).

Left out: any aggregation; a row holds what one step measured.
"""

import contextlib
import json
import math
import numbers
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rome import files

STAGES = ("generate", "env", "train")
# What a row says of the clock, and of what the engine happened to know when a request came. It is
# not in files of its own, because rows are read by people; `repeatable` compares without it.
CLOCK = frozenset(
  (
    *("wall", "tokens_per_s_sampled", "tokens_per_s_trained", "env_steps_per_s", "cached_share"),
    *(f"share_{stage}" for stage in (*STAGES, "other")),
  )
)
MISMATCH_PARTS = 4  # of a row, for each of which the gap between engine and trainer is a metric


class JsonlError(ValueError):
  """A JSON Lines file that is not what this project wrote, in one line that names file and row."""


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Rows of a JSON Lines file.

  A last line without its newline is what a killed writer leaves; it is dropped.

  Raises:
    JsonlError: any other line is not a JSON object.
    OSError: the file cannot be read.
  """
  rows = []
  for number, line in enumerate(pathlib.Path(path).read_bytes().split(b"\n")[:-1], start=1):
    try:
      row = json.loads(line)
    except ValueError as error:
      raise JsonlError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(row, dict):
      raise JsonlError(f"{path}, line {number}: not a JSON object")
    rows.append(row)
  return rows


def repeatable(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Rows of metrics.jsonl without `CLOCK`: what every run of the same seed has to write."""
  return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def is_number(value: object) -> bool:
  """Whether a value read from JSON is a number; true and false are not."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)


class JsonlFile:
  """An append-only JSON Lines file whose length can be part of a checkpoint.

  Opening drops a torn last line; everything complete stays. A context manager.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = pathlib.Path(path)
    with files.writing(self.path):
      self._file = open(self.path, "ab", buffering=0)
    complete = self.path.read_bytes().rfind(b"\n") + 1
    self._file.truncate(complete)

  def append(self, row: Mapping[str, Any]) -> None:
    """Writes one row through to the operating system.

    Raises:
      ValueError: the row holds NaN or an infinity, which JSON cannot say.
      WriteError: the disk takes no more; what it took of the row goes at the next opening.
    """
    files.append(self._file, json.dumps(row, allow_nan=False).encode() + b"\n")

  def position(self) -> int:
    """Bytes written so far; give it to `restore` to forget what came later.

    They are on the disk: a checkpoint must not outlive the rows that it counts on.
    """
    with files.writing(self.path):
      os.fsync(self._file.fileno())
    return os.fstat(self._file.fileno()).st_size

  def restore(self, position: int) -> None:
    """Drops every row after `position`.

    Raises:
      JsonlError: the file is shorter than that, or `position` is not the end of a row.
    """
    data = self.path.read_bytes()
    if not 0 <= position <= len(data) or (position and data[position - 1 : position] != b"\n"):
      raise JsonlError(
        f"{self.path}: no row ends at byte {position} of {len(data)}, where the checkpoint stood; "
        "it was changed since. Start again in a new workdir"
      )
    self._file.truncate(position)

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> "JsonlFile":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class MetricsWriter:
  """Writes metric rows to WORKDIR/metrics.jsonl and WORKDIR/tensorboard.

  A row is {"phase", "step", "wall", name: number, ...}; `wall` counts seconds of running time and
  goes on after a resume where the last kept row stood. A context manager.

  Args:
    workdir: an existing directory.
    clock: seconds from any origin; for tests.
  """

  def __init__(self, workdir: str | os.PathLike[str], clock: Callable[[], float] = time.monotonic):
    self._events_dir = pathlib.Path(workdir) / "tensorboard"
    self._rows = JsonlFile(pathlib.Path(workdir) / "metrics.jsonl")
    self._events: Any = None
    self._clock = clock
    self._start = clock() - self._last_wall()

  def write(self, phase: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Appends one row and returns it.

    Args:
      phase: "sft", "rl", "eval" or "alarm".
      step: updates done in this phase.
      values: numbers (Python, numpy or 0-d jax) and short strings; None is what this step could not
        measure and is left out of the row.

    Raises:
      FloatingPointError: a number is not finite; nothing is written.
      TypeError: a value is neither a number nor a string.
    """
    wall = round(self._clock() - self._start, 3)
    row: dict[str, Any] = {"phase": phase, "step": int(step), "wall": wall}
    for name, value in values.items():
      if value is not None:
        row[name] = _plain(phase, step, name, value)
    self._rows.append(row)
    self._show([row])
    return row

  def position(self) -> int:
    """Bytes of metrics.jsonl so far, for the checkpoint."""
    return self._rows.position()

  def restore(self, position: int) -> None:
    """Forgets every row after `position`, in both formats.

    Raises:
      JsonlError: no row ends there.
    """
    self._rows.restore(position)
    self._start = self._clock() - self._last_wall()
    self._close_events()
    shutil.rmtree(self._events_dir, ignore_errors=True)
    self._show(read_jsonl(self._rows.path))

  def close(self) -> None:
    self._close_events()
    self._rows.close()

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _last_wall(self) -> float:
    rows = read_jsonl(self._rows.path)
    return float(rows[-1]["wall"]) if rows else 0.0

  def _show(self, rows: Iterable[Mapping[str, Any]]) -> None:
    # Not `SummaryWriter`: on a full disk its thread dies and its queue then blocks the run.
    # Half a second that a report need not pay.
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    with files.writing(self._events_dir):
      for row in rows:
        if self._events is None:
          self._events_dir.mkdir(exist_ok=True)
          self._events = event_file_writer.EventsWriter(str(self._events_dir / "events"))
        for name, value in row.items():
          if name not in ("phase", "step") and not isinstance(value, str):
            scalar = summary.scalar(f"{row['phase']}/{name}", value)
            self._events.write_event(
              event_pb2.Event(wall_time=time.time(), step=row["step"], summary=scalar)
            )
      if self._events is not None:
        self._events.flush()

  def _close_events(self) -> None:
    if self._events is not None:
      # Every row was flushed; on a full disk it was told then.
      with contextlib.suppress(OSError):
        self._events.close()
      self._events = None


def _plain(phase: str, step: int, name: str, value: Any) -> int | float | str:
  """A value as JSON has it; raises as `MetricsWriter.write` says."""
  if isinstance(value, str):
    return value
  if isinstance(value, numbers.Integral):
    return int(value)
  try:
    number = float(value)
  except (TypeError, ValueError) as error:
    raise TypeError(f"metric {name} of {phase} step {step} is no number: {value!r}") from error
  if not math.isfinite(number):
    raise FloatingPointError(f"metric {name} of {phase} step {step} is {number}")
  return number


class StageTimer:
  """Shares of wall time by stage since the last `reset`; what no stage claims is "other".

  Stages follow one another on the controlling thread: environments that run while the engine
  generates cost only the time that the engine had to wait for them.
  """

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock = clock
    self.reset()

  def reset(self) -> None:
    self._start = self._clock()
    self._seconds = dict.fromkeys(STAGES, 0.0)

  def add(self, stage: str, seconds: float) -> None:
    """Credits time measured elsewhere.

    Raises:
      KeyError: a stage not in STAGES.
    """
    if stage not in self._seconds:
      raise KeyError(f"no stage {stage!r}; stages are {', '.join(STAGES)}")
    self._seconds[stage] += seconds

  @contextlib.contextmanager
  def stage(self, name: str) -> Iterator[None]:
    """Credits the time spent inside the block, also when it raises."""
    start = self._clock()
    try:
      yield
    finally:
      self.add(name, self._clock() - start)

  def total(self) -> float:
    """Seconds since the last reset."""
    return self._clock() - self._start

  def seconds(self, stage: str) -> float:
    return self._seconds[stage]

  def shares(self) -> dict[str, float]:
    """{"share_generate", "share_env", "share_train", "share_other"}, which sum to 1."""
    total = max(self.total(), sum(self._seconds.values()), 1e-9)
    shares = {f"share_{name}": seconds / total for name, seconds in self._seconds.items()}
    return shares | {"share_other": max(0.0, 1.0 - sum(shares.values()))}

  def rate(self, count: float, stage: str) -> float | None:
    """`count` per second of a stage; None where the stage took no time."""
    return count / self._seconds[stage] if self._seconds[stage] > 0 else None
