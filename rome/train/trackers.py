"""Optional trackers, wandb and mlflow: views of metrics.jsonl on somebody else's pages.

A thread for each tracker follows metrics.jsonl and sends what is new, so that a slow server never
holds up an update; one that fails is switched off after one line, and training goes on. The next
start tries again and sends what it missed.

One rule decides what a tracker holds: the k-th row of metrics.jsonl once, as it first was. WORKDIR/
trackers/NAME.json has the tracker's id of the run and how many rows it holds for sure. Services
cannot take points back, so a resumed run, which forgets the rows after its checkpoint and makes
them again, adds nothing until it has passed the row where it was killed. A synchronous run makes
the same values again; of an asynchronous one the tracker keeps the first, metrics.jsonl the ones
that count.

Where the data goes, under which project and as whom is set in the clients' own ways (WANDB_MODE,
WANDB_PROJECT, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ...).

Left out: text in rows, transcripts and checkpoints; they are in the workdir.
"""

import contextlib
import importlib.util
import json
import logging
import os
import pathlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from tqdm import tqdm

from rome import files
from rome.train.config import TRACKERS, ConfigError
from rome.train.metrics import is_number

POLL_SECONDS = 1.0
CLOSE_SECONDS = 30.0  # for the last rows to leave; then the run ends without them
# What wandb may take to find its server and to upload the rest; it would take 90 s and forever.
_INIT_SECONDS, _FINISH_SECONDS = 30, 20


class Tracker(Protocol):
  """A run on a tracker's side.

  Attributes:
    id: by which the tracker knows the run.
    where: a person finds it there.
    sure: whether a row that was sent is there even if this process is killed. If not, rows are sent
      again by the start after that, and the tracker has to know them by their index.
  """

  id: str
  where: str
  sure: bool

  def send(self, index: int, row: Mapping[str, Any]) -> None:
    """Sends row number `index` of metrics.jsonl."""

  def close(self, finished: bool) -> None:
    """Waits until everything has left, and says whether the run has come to its end."""


class Wandb:
  """A run of Weights & Biases. Charts are over the updates of a phase, "rl/loss" over "rl/step".

  Its client keeps the newest rows in a process of its own, and a kill may cost them. Its own step,
  here a row's index, only grows: of what it was sent before, a server takes nothing. Offline such
  rows stand in the files of two starts; no server was at hand to try what wandb sync makes of that.
  """

  sure = False

  def __init__(self, workdir: pathlib.Path, run_id: str | None, about: Mapping[str, Any]):
    import wandb

    self.id = run_id or uuid.uuid4().hex[:12]
    self._run = wandb.init(
      project=os.environ.get("WANDB_PROJECT", "rome"),
      name=os.environ.get("WANDB_NAME", workdir.resolve().name),
      dir=os.environ.get("WANDB_DIR", str(workdir)),
      id=self.id,
      resume="allow",
      config=dict(about),
      settings=wandb.Settings(
        console="off",
        silent=True,
        init_timeout=_INIT_SECONDS,
        finish_timeout=_FINISH_SECONDS,
        finish_timeout_raises=True,  # else rows that never left would count as held
      ),
    )
    offline = self._run.offline  # then it has no address, and says so where it is asked for one
    self.where = f"{self._run.dir} (for wandb sync)" if offline else str(self._run.url)
    self._phases: set[str] = set()

  def send(self, index: int, row: Mapping[str, Any]) -> None:
    phase = row["phase"]
    if phase not in self._phases:
      self._phases.add(phase)
      self._run.define_metric(f"{phase}/step")
      self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
    self._run.log({**scalars(row), f"{phase}/step": row["step"]}, step=index)

  def close(self, finished: bool) -> None:
    self._run.finish(exit_code=0 if finished else 1)


class MLflow:
  """A run of MLflow: settings are its parameters, facts of the newest start its tags."""

  sure = True

  def __init__(self, workdir: pathlib.Path, run_id: str | None, about: Mapping[str, Any]):
    from mlflow import MlflowClient, entities

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it makes
    self._entities, self._client = entities, MlflowClient()
    self.id = run_id or self._create(workdir, about["settings"])
    self._client.update_run(self.id, status="RUNNING")
    for name, value in _flat(about["start"]):
      self._client.set_tag(self.id, name, value)
    self.where = f"{self._client.tracking_uri}, run {self.id}"

  def _create(self, workdir: pathlib.Path, settings: Mapping[str, Any]) -> str:
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rome")
    found = self._client.get_experiment_by_name(experiment)
    number = found.experiment_id if found else self._client.create_experiment(experiment)
    run_id = self._client.create_run(number, run_name=workdir.resolve().name).info.run_id
    parameters = [self._entities.Param(name, value) for name, value in _flat(settings)]
    for k in range(0, len(parameters), 100):  # its limit
      self._client.log_batch(run_id, params=parameters[k : k + 100])
    return run_id

  def send(self, index: int, row: Mapping[str, Any]) -> None:
    now = int(time.time() * 1000)
    metrics = [
      self._entities.Metric(name, value, now, row["step"]) for name, value in scalars(row).items()
    ]
    self._client.log_batch(self.id, metrics=metrics)

  def close(self, finished: bool) -> None:
    self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


_KINDS: dict[str, Callable[[pathlib.Path, str | None, Mapping[str, Any]], Tracker]]
_KINDS = dict(zip(TRACKERS, (Wandb, MLflow), strict=True))


def check(names: Sequence[str]) -> None:
  """Refuses trackers that are not installed, before anything is computed.

  Raises:
    ConfigError: naming the tracker and what to install.
  """
  for name in names:
    if importlib.util.find_spec(name) is None:
      raise ConfigError(
        f"config.trackers names {name!r}, which is not installed: pip install 'rome[{name}]'"
      )


def read_notes(workdir: pathlib.Path, name: str) -> dict[str, Any]:
  """The id that a tracker has for the run, and how many "rows" it surely holds; empty before."""
  path = _notes(workdir, name)
  return json.loads(path.read_bytes()) if path.exists() else {}


class Trackers:
  """The trackers of a run that has begun: what metrics.jsonl holds and will hold goes to them.

  Args:
    names: of TRACKERS, installed.
    workdir: with the run's metrics.jsonl, cut back to the checkpoint if the run goes on.
    settings: of the run, nested.
    start: facts about this start, nested.
  """

  def __init__(
    self,
    names: Sequence[str],
    workdir: pathlib.Path,
    settings: Mapping[str, Any],
    start: Mapping[str, Any],
  ):
    about = {"settings": settings, "start": start}
    self._feeds = [_Feed(name, workdir, about) for name in names]
    for feed in self._feeds:
      feed.start()

  def close(self, finished: bool) -> None:
    """Sends the last rows; gives up after CLOSE_SECONDS, with a line.

    Args:
      finished: the run has come to its end, and was not interrupted.
    """
    deadline = time.monotonic() + CLOSE_SECONDS
    for feed in self._feeds:
      feed.end(finished)
    for feed in self._feeds:
      feed.join(max(deadline - time.monotonic(), 0.0))
      if feed.is_alive():
        tqdm.write(
          f"tracker {feed.kind}: did not take the last rows within {CLOSE_SECONDS:.0f} s; "
          "metrics.jsonl has all of them"
        )
    self._feeds = []


class _Feed(threading.Thread):
  """Follows metrics.jsonl for one tracker. A daemon: a server that hangs keeps no process alive."""

  def __init__(self, kind: str, workdir: pathlib.Path, about: Mapping[str, Any]):
    super().__init__(name=f"tracker {kind}", daemon=True)
    self.kind, self._workdir, self._about = kind, workdir, about
    self._end, self._finished = threading.Event(), False

  def end(self, finished: bool) -> None:
    self._finished = finished
    self._end.set()

  def run(self) -> None:
    try:
      self._follow()
    except Exception as error:  # Whatever it is, of a client or a server: training goes on.
      words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
      tqdm.write(f"tracker {self.kind} is off until the run is started again ({words})")

  def _follow(self) -> None:
    notes = read_notes(self._workdir, self.kind)
    tracker = _KINDS[self.kind](self._workdir, notes.get("id"), self._about)
    sent = notes.get("rows", 0)
    self._note(tracker.id, sent)
    tqdm.write(f"tracker {self.kind}: {tracker.where}")
    try:
      for index, row in self._rows():
        if index >= sent:
          tracker.send(index, row)
          sent = index + 1
          if tracker.sure:
            self._note(tracker.id, sent)
    except BaseException:
      with contextlib.suppress(Exception):  # what went wrong before is what is told
        tracker.close(finished=False)
      raise
    tracker.close(self._finished)
    self._note(tracker.id, sent)

  def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of metrics.jsonl with their numbers, as they come, until the run ends."""
    index, rest = 0, b""
    with open(self._workdir / "metrics.jsonl", "rb") as file:
      while True:
        ending = self._end.wait(POLL_SECONDS)
        *lines, rest = (rest + file.read()).split(b"\n")
        for line in lines:
          yield index, json.loads(line)
          index += 1
        if ending:
          return

  def _note(self, run_id: str, rows: int) -> None:
    path = _notes(self._workdir, self.kind)
    path.parent.mkdir(exist_ok=True)
    files.write_atomic(path, json.dumps({"id": run_id, "rows": rows}) + "\n")


def _notes(workdir: pathlib.Path, name: str) -> pathlib.Path:
  return workdir / "trackers" / f"{name}.json"


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
  """The figures of a row by the names that they have in TensorBoard, "rl/loss"."""
  return {
    f"{row['phase']}/{name}": value
    for name, value in row.items()
    if name != "step" and is_number(value)
  }


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
  """("a.b", text) for each leaf."""
  for name, value in values.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", str(value)
