"""`rome report WORKDIR`: one self-contained page about a run, from the files that the run left.

Reads metrics.jsonl and, where they are there, summary.json, episodes.jsonl, config.json and
run.json; works while the run is still going, with --live as a page that keeps itself up to date.
Figures are shown as the run wrote them: nothing is measured here.

Left out: comparisons of several runs.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rome import files, rollout
from rome.train import report_live
from rome.train import report_page as page
from rome.train import report_sections as sections
from rome.train.metrics import JsonlError, is_number, read_jsonl


class ReportError(ValueError):
  """The workdir holds no run that can be shown; one line says what is wrong."""


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run left behind.

  Attributes:
    workdir: where.
    rows: of metrics.jsonl, each with "phase" (string), "step" and "wall" (numbers).
    episodes: of episodes.jsonl, each with "turns", a list of objects; may be empty.
    summary: of summary.json; empty while the run has not finished.
    config: of config.json; empty where the run wrote none.
    marks: of timeline.json (`rome.rollout.timeline`); empty where the run wrote none.
    starts: of run.json (`rome.train.launches`), oldest first; empty where the run wrote none.
  """

  workdir: pathlib.Path
  rows: list[dict[str, Any]]
  episodes: list[dict[str, Any]]
  summary: dict[str, Any]
  config: dict[str, Any]
  marks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  starts: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def load_run(workdir: str | os.PathLike[str]) -> Run:
  """Reads and checks the files of a run.

  Raises:
    ReportError: a file is missing, unreadable or not what a run writes.
  """
  path = pathlib.Path(workdir)
  if not path.is_dir():
    raise ReportError(f"{path} is no directory; give the --workdir of a run")
  if not (path / "metrics.jsonl").exists():
    raise ReportError(f"{path} has no metrics.jsonl; give the --workdir of a run that has started")
  try:
    rows = read_jsonl(path / "metrics.jsonl")
    episodes = read_jsonl(path / "episodes.jsonl") if (path / "episodes.jsonl").exists() else []
  except (JsonlError, OSError) as error:
    raise ReportError(str(error)) from error
  if not rows:
    raise ReportError(f"{path / 'metrics.jsonl'} holds no complete row yet")
  for index, row in enumerate(rows, start=1):
    if not (isinstance(row.get("phase"), str) and is_number(row.get("step"))):
      raise ReportError(f"{path / 'metrics.jsonl'}, line {index}: no phase and step")
  for index, episode in enumerate(episodes, start=1):
    turns = episode.get("turns")
    if not (isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)):
      raise ReportError(f"{path / 'episodes.jsonl'}, line {index}: turns is no list of objects")
  summary = _read_object(path / "summary.json")
  _check_summary(path / "summary.json", summary)
  try:
    marks = rollout.read_marks(path / "timeline.json")
  except OSError:
    marks = []
  starts = _read_object(path / "run.json").get("starts", [])
  if not (isinstance(starts, list) and all(isinstance(start, dict) for start in starts)):
    raise ReportError(f"{path / 'run.json'}: starts is no list of objects")
  return Run(path, rows, episodes, summary, _read_object(path / "config.json"), marks, starts)


def render(run: Run, refresh: int | None = None) -> str:
  """The page, as HTML; one that asks for itself again every `refresh` seconds, if given."""
  title = f"{run.workdir.resolve().name}: a run of rome"
  return page.page(
    title,
    [
      sections.header(title, run.summary, run.rows, run.starts),
      sections.headline(run.summary, run.rows),
      sections.families(run.summary, run.rows),
      sections.curves(run.rows),
      sections.timeline(run.marks),
      sections.transcripts(run.episodes),
      sections.settings(run.summary, run.config, run.starts),
    ],
    refresh,
  )


def write_report(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Writes WORKDIR/report.html, replacing it in one step, and returns its path.

  Raises:
    ReportError: as `load_run`, or the page cannot be written.
  """
  run = load_run(workdir)
  target = run.workdir / "report.html"
  try:
    files.write_atomic(target, render(run))
  except OSError as error:
    raise ReportError(f"cannot write {target}: {error.strerror}") from error
  return target


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `rome report ...` and returns the exit code; 1 after one line on stderr."""
  parser = argparse.ArgumentParser(
    prog="rome report", description="Write WORKDIR/report.html from what a run left there."
  )
  parser.add_argument("workdir", metavar="WORKDIR", help="the --workdir of a run")
  parser.add_argument(
    "--live", action="store_true", help="serve the page on this machine, up to date, until Ctrl-C"
  )
  parser.add_argument(
    "--port", type=int, metavar="N", help="with --live: where; 0, the default, takes a free one"
  )
  arguments = parser.parse_args(argv)
  if arguments.port is not None and not arguments.live:
    parser.error("--port is of --live")
  try:
    if arguments.live:
      _serve(pathlib.Path(arguments.workdir), arguments.port or 0)
    else:
      print(write_report(arguments.workdir))
  except ReportError as error:
    print(f"rome report: {error}", file=sys.stderr)
    return 1
  return 0


def _serve(workdir: pathlib.Path, port: int) -> None:
  """Serves the page until Ctrl-C.

  Raises:
    ReportError: WORKDIR is no directory, or the port is taken.
  """
  if not workdir.is_dir():
    raise ReportError(f"{workdir} is no directory; give the --workdir of a run")

  def draw() -> str:
    run = load_run(workdir)
    return render(run, None if run.summary else report_live.REFRESH_SECONDS)

  try:
    server = report_live.LiveReport(workdir, draw, ReportError, port)
  except (OSError, OverflowError) as error:
    raise ReportError(
      f"cannot listen on port {port} ({error}); --port=0 takes a free one"
    ) from error
  with server:
    print(f"serving {server.url} until Ctrl-C", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
      server.serve_forever()


def _read_object(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; empty where there is no such file."""
  try:
    value = json.loads(path.read_bytes())
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise ReportError(f"{path}: not JSON ({error})") from error
  if not isinstance(value, dict):
    raise ReportError(f"{path}: not a JSON object")
  return value


def _check_summary(path: pathlib.Path, summary: Mapping[str, Any]) -> None:
  """Refuses a summary whose figures are not what `sections` draws."""
  families = summary.get("families", {})
  if not (isinstance(families, dict) and all(isinstance(f, dict) for f in families.values())):
    raise ReportError(f"{path}: families is no object of objects")
  for where, part in (("", summary), *((f"families.{n}.", f) for n, f in families.items())):
    for name, value in part.items():
      if name.endswith("_interval") or name == "interval":
        fine = isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
      elif name in _NUMBERS:
        fine = is_number(value)
      elif name in ("stage_shares", "speeds"):
        fine = isinstance(value, dict) and all(map(is_number, value.values()))
      else:
        continue
      if not fine and value is not None:
        raise ReportError(f"{path}: {where}{name} is {value!r}, which no run writes")


_NUMBERS = (
  *("success_before", "success_after", "before", "after", "n"),
  *("wall_seconds", "peak_rss_mb"),
)
