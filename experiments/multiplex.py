"""Devices that turn from rollout to training and back, against static splits: simulated.

  python -m experiments.multiplex --workdir=runs/multiplex [--seeds=5]

A sweep over the part that rollout has in the work, how unequal episodes are, and how old samples
may be, with measured stage times (experiments/multiplexing/measured.json). The best of all static
splits stands against the best of all subsets that may turn to training. Leaves results.json,
report.md and report.png in WORKDIR; about 15 minutes on an idle core.
"""

import concurrent.futures as cf
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import sys

from absl import app, flags
from tqdm import tqdm

from experiments.ablations import figures
from experiments.multiplexing import report
from experiments.multiplexing.simulator import Policy, policies, simulate
from experiments.multiplexing.workload import Draws, Stages, Workload

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the results.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 5, "Sets of episodes that each policy plays.", lower_bound=2)
_UPDATES = flags.DEFINE_integer("updates", 16, "Updates that are measured.", lower_bound=1)
_SHARES = flags.DEFINE_list("shares", ["0.5", "0.7", "0.85"], "Rollout's parts in the work.")
_JOBS = flags.DEFINE_integer("jobs", os.cpu_count(), "Processes.", lower_bound=1)
_TAILS = flags.DEFINE_list("tails", ["0.25", "0.75", "1.25"], "Sigmas of the number of turns.")

_DROPPING_SHARE = 0.7  # where too old samples are also dropped instead of waited for

# Each is one change of the middle cell: a share of 0.7, a tail of 0.75, alpha 1.
_VARIANTS = {
  "as in the table above": {},
  "each doubling of trainers is worth 1.9": {"scaling": 0.926},
  "new weights take 10 times as long": {"publish": 0.964},
  "environments as fast as recorded": {"env_share": None},
  "environments are half of an episode": {"env_share": 0.5},
  "64 rows a device": {"slots": 64},
  "4 devices": {"devices": 4},
  "training begins with 1.5 batches": {"threshold": 1.5},
}


@dataclasses.dataclass(frozen=True)
class Job:
  """A cell to be simulated: every policy on the same episodes."""

  workload: Workload
  stages: Stages
  alpha: int
  drop: bool = False
  threshold: float = 1.0

  def run(self, seeds: int, updates: int) -> report.Cell:
    runs: dict[Policy, list] = {}
    for seed in range(seeds):
      draws = Draws(self.workload, self.stages, seed)
      for policy in policies(self.workload.devices, self.alpha, self.drop, self.threshold):
        runs.setdefault(policy, []).append(simulate(draws, policy, updates=updates))
    return report.Cell(self.workload, self.alpha, self.drop, runs)


def _variant(change: dict, stages: Stages) -> Job:
  """One line of `_VARIANTS`: its settings are of the stages, the workload or the policies."""
  stage_names = {f.name for f in dataclasses.fields(Stages)}
  of_stages = {k: v for k, v in change.items() if k in stage_names}
  of_job = {k: v for k, v in change.items() if k == "threshold"}
  of_workload = {k: v for k, v in change.items() if k not in of_stages | of_job}
  return Job(Workload(**of_workload), dataclasses.replace(stages, **of_stages), 1, **of_job)


def _run(jobs: list[Job]) -> list[report.Cell]:
  run = functools.partial(Job.run, seeds=_SEEDS.value, updates=_UPDATES.value)
  # Not forked: jax, which experiments.ablations.figures names the device with, has threads.
  spawn = multiprocessing.get_context("spawn")
  with cf.ProcessPoolExecutor(_JOBS.value, spawn) as pool:
    cells = pool.map(run, jobs)
    return list(tqdm(cells, total=len(jobs), unit="cell", disable=not sys.stderr.isatty()))


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  try:
    shares: list[float | None] = [None, *map(float, _SHARES.value)]
    tails = [float(tail) for tail in _TAILS.value]
  except ValueError as error:
    raise app.UsageError(str(error)) from None
  workdir = pathlib.Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  stages = Stages.measured()
  grid = [Workload(rollout_share=share, tail=tail) for share in shares for tail in tails]
  jobs = [Job(workload, stages, alpha) for workload in grid for alpha in (0, 1, 2)]
  dropping = [w for w in grid if w.rollout_share == _DROPPING_SHARE]
  jobs += [Job(workload, stages, alpha, drop=True) for workload in dropping for alpha in (1, 2)]
  found = _run([*jobs, *(_variant(change, stages) for change in _VARIANTS.values())])
  cells, variants = found[: len(jobs)], dict(zip(_VARIANTS, found[len(jobs) :], strict=True))
  text = report.tables(stages, cells, variants)
  (workdir / "report.md").write_text(text)
  value = report.as_json(stages, cells, variants) | figures.provenance()
  figures.write_json(workdir / "results.json", value | {"updates": _UPDATES.value})
  report.draw(
    workdir / "report.png", stages, [cell for cell in cells if cell.alpha and not cell.drop]
  )
  print(text)


if __name__ == "__main__":
  app.run(main)
