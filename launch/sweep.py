"""Runs one program over a sweep of settings, in XManager's shape.

Flags make an `Experiment`: one `Executable` (a module of this project) and a `Job` for each point
of the sweep, with a work directory of its own. A launcher runs the jobs: `local` as processes on
this machine, `xm_local` through XManager where that is installed (extra [xm], in an environment of
its own). A point whose summary.json exists is done and is not run again.

  python -m launch.sweep --config=experiments/configs/quickstart.py --workdir=runs/lr \\
    --sweep="seed=0,1,2;rl.learning_rate=1e-3,3e-4" --max_parallel=2

Each point's program gets --config, --workdir=DIR/POINT, --config.NAME=VALUE for each setting, and
whatever follows `--`. Instead of a product, --sweep may name a Python file with a function
`points()` that yields dictionaries from names to values.

Left out: launchers for clusters, and any search that chooses points by results.
"""

import dataclasses
import itertools
import json
import pathlib
import re
import runpy
import sys
from collections.abc import Iterable, Mapping, Sequence

from absl import app, flags

from launch import local, xm_local

_CONFIG = flags.DEFINE_string("config", None, "Config file of every point.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the sweep.", required=True)
_SWEEP = flags.DEFINE_string(
  "sweep", None, 'Like "seed=0,1;rl.learning_rate=1e-3,3e-4", or a Python file.', required=True
)
_MODULE = flags.DEFINE_string("module", "experiments.train", "Program to run, as for python -m.")
_MAX_PARALLEL = flags.DEFINE_integer("max_parallel", 1, "Jobs at a time.", lower_bound=1)
_LAUNCHER = flags.DEFINE_enum("launcher", "local", ["local", "xm_local"], "Who runs the jobs.")
_PYTHON = flags.DEFINE_string("python", sys.executable, "Interpreter that has rome installed.")


class SweepError(ValueError):
  """The sweep cannot be read or launched; one line says why."""


@dataclasses.dataclass(frozen=True)
class Executable:
  """A program: an interpreter, a module for its -m, and the arguments that all jobs share."""

  python: str
  module: str
  args: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Job:
  """One point of a sweep.

  Attributes:
    name: unique in its experiment, and the name of its directory.
    executable: the program.
    args: arguments of this job alone, --workdir among them.
    workdir: where it leaves its files.
  """

  name: str
  executable: Executable
  args: tuple[str, ...]
  workdir: pathlib.Path

  @property
  def command(self) -> list[str]:
    program = self.executable
    return [program.python, "-m", program.module, *program.args, *self.args]

  @property
  def done(self) -> bool:
    return (self.workdir / "summary.json").exists()


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A named set of jobs."""

  title: str
  jobs: tuple[Job, ...]


def parse_sweep(text: str) -> list[dict[str, str]]:
  """Points of "name=value,value;name=value": the product, the first name varying slowest.

  Raises:
    SweepError: an axis without name or values, or a name or value twice.
  """
  axes: dict[str, list[str]] = {}
  for axis in filter(None, (part.strip() for part in text.split(";"))):
    name, found, values = axis.partition("=")
    name, options = name.strip(), [value.strip() for value in values.split(",")]
    if not (name and found and all(options)):
      raise SweepError(f'--sweep: "{axis}" is not like "name=value,value"')
    if name in axes or len(set(options)) < len(options):
      raise SweepError(f'--sweep: "{axis}" repeats a name or a value')
    axes[name] = options
  if not axes:
    raise SweepError('--sweep is empty; give it like "seed=0,1,2"')
  return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def load_points(path: str) -> list[dict[str, str]]:
  """Points that the function `points` of a Python file yields.

  Raises:
    SweepError: there is no such file or function, or it yields something else.
  """
  if not pathlib.Path(path).is_file():
    raise SweepError(f"--sweep: there is no file {path}")
  function = runpy.run_path(path).get("points")
  if not callable(function):
    raise SweepError(f"--sweep: {path} defines no function points()")
  points = list(function())
  if not points or not all(isinstance(point, Mapping) for point in points):
    raise SweepError(f"--sweep: points() of {path} must yield dictionaries, at least one")
  return [{str(name): str(value) for name, value in point.items()} for point in points]


def make_experiment(
  points: Iterable[Mapping[str, str]],
  executable: Executable,
  workdir: pathlib.Path,
) -> Experiment:
  """A job for each point.

  Raises:
    SweepError: two points share a name.
  """
  jobs = []
  for point in points:
    name = point_name(point)
    settings = [f"--config.{key}={value}" for key, value in point.items()]
    args = (f"--workdir={workdir / name}", *settings)
    jobs.append(Job(name, executable, args, workdir / name))
  names = [job.name for job in jobs]
  if len(set(names)) < len(names):
    twice = next(name for name in names if names.count(name) > 1)
    raise SweepError(f"--sweep: two points would write to {workdir / twice}")
  return Experiment(workdir.name, tuple(jobs))


def point_name(point: Mapping[str, str]) -> str:
  """A directory name that says the settings, with anything a path cannot hold replaced."""
  text = ",".join(f"{name}={value}" for name, value in point.items())
  return re.sub(r"[^\w.,=+-]", "_", text)[:200] or "default"


def _launch(experiment: Experiment) -> list[local.Result]:
  if _LAUNCHER.value == "local":
    return local.launch(experiment.jobs, _MAX_PARALLEL.value)
  if _MAX_PARALLEL.present:
    raise SweepError("--max_parallel: xm_local starts all jobs at once; leave one of the two out")
  return xm_local.launch(experiment.title, experiment.jobs)


def table(results: Sequence[local.Result]) -> str:
  """One line a job: how it ended, what it took, and success before and after where it says so."""
  rows = [("point", "state", "seconds", "before", "after")]
  for result in results:
    seconds = f"{result.seconds:.0f}" if result.seconds is not None else ""
    rows.append((result.job.name, result.state, seconds, *_successes(result.job)))
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  padded = (zip(row, widths, strict=True) for row in rows)
  return "\n".join("  ".join(cell.ljust(w) for cell, w in row).rstrip() for row in padded)


def _successes(job: local.Job) -> tuple[str, str]:
  """Success before and after as the job's summary has them; blank where it does not."""
  try:
    summary = json.loads((job.workdir / "summary.json").read_bytes())
    return f"{summary['success_before']:.3f}", f"{summary['success_after']:.3f}"
  except (OSError, ValueError, KeyError, TypeError):
    return "", ""


def main(argv: Sequence[str]) -> int:
  """Runs the sweep; 0 where every point is done, 1 where one failed, 130 where it was stopped."""
  is_file = _SWEEP.value.endswith(".py")
  try:
    points = load_points(_SWEEP.value) if is_file else parse_sweep(_SWEEP.value)
    args = (f"--config={_CONFIG.value}", *argv[1:])
    executable = Executable(_PYTHON.value, _MODULE.value, args)
    experiment = make_experiment(points, executable, pathlib.Path(_WORKDIR.value).resolve())
    results = _launch(experiment)
  except (SweepError, xm_local.XManagerMissing, OSError) as error:
    print(f"launch.sweep: {error}", file=sys.stderr)
    return 2
  print(table(results))
  if any(result.state == local.STOPPED for result in results):
    return 130
  return int(any(result.state not in (local.DONE, local.SKIPPED) for result in results))


if __name__ == "__main__":
  app.run(main)
