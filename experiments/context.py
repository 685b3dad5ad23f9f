"""Whether context engineering pays: long tasks, each technique off and on.

  python -m experiments.context --workdir=runs/context [--seeds=5 --jobs=2]

Five families of tasks whose history is several times the window
(experiments/contexts/families.py), each episode in a bubblewrap sandbox: with no technique, with
compaction alone and one more, with all but one, and with all. The policy is a script whose
behaviour depends only on what a request shows (experiments/contexts/policy.py). `--model` names
another one: a directory of trained weights (experiments/contexts/train.py makes them, for
`--scale=small`), or module:name of what makes a `rome.agent.model.Model` from a task and a seed.
Leaves results.json, report.md and report.png in WORKDIR; about 7 minutes on two busy cores.
"""

import concurrent.futures as cf
import dataclasses
import functools
import importlib
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Callable

from absl import app, flags
from tqdm import tqdm

from experiments.contexts.families import FAMILIES
from experiments.contexts.play import SCALES, Result, arms, play

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the results.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 5, "Tasks of each family.", lower_bound=1)
_JOBS = flags.DEFINE_integer("jobs", os.cpu_count(), "Processes.", lower_bound=1)
_FAMILIES = flags.DEFINE_list("families", list(FAMILIES), "Which of them.")
_ARMS = flags.DEFINE_list("arms", list(arms()), "Sets of techniques.")
_MODEL = flags.DEFINE_string("model", "experiments.contexts.policy:Scripted", "The policy.")
_SCALE = flags.DEFINE_enum("scale", "large", list(SCALES), "Of tasks and window.")


def _load(name: str) -> Callable:
  if os.path.isdir(name):
    from experiments.contexts import learned  # brings jax

    return functools.partial(learned.Learned, name)
  module, _, attribute = name.partition(":")
  return getattr(importlib.import_module(module), attribute)


def _play(job: tuple[str, str, int, str, str]) -> Result:
  family, arm, seed, model, scale = job
  return play(family, arm, seed, _load(model), SCALES[scale])


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  for name, given, known in (("families", _FAMILIES, FAMILIES), ("arms", _ARMS, arms())):
    if wrong := [one for one in given.value if one not in known]:
      raise app.UsageError(f"--{name}: no {wrong[0]!r}; there are: {', '.join(known)}")
  try:
    _load(_MODEL.value)
    if os.path.isdir(_MODEL.value):
      from experiments.contexts import learned

      learned.check(_MODEL.value, _SCALE.value)
  except (AttributeError, ImportError, ValueError) as error:
    raise app.UsageError(
      f"--model={_MODEL.value}: {error}; want a directory or module:name"
    ) from None
  from experiments.ablations import figures  # they bring jax, which no worker needs
  from experiments.contexts import report

  jobs = [
    (family, arm, seed, _MODEL.value, _SCALE.value)
    for seed in range(_SEEDS.value)
    for family in _FAMILIES.value
    for arm in _ARMS.value
  ]
  value: dict = {
    "model": _MODEL.value,
    "scale": _SCALE.value,
    "seeds": _SEEDS.value,
    **figures.provenance(),
  }
  spawn = multiprocessing.get_context("spawn")
  with cf.ProcessPoolExecutor(_JOBS.value, spawn) as pool:
    played = pool.map(_play, jobs)
    results = list(tqdm(played, total=len(jobs), unit="episode", disable=not sys.stderr.isatty()))
  workdir = pathlib.Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  text = report.tables(results, _SCALE.value)
  (workdir / "report.md").write_text(text)
  value["episodes"] = [dataclasses.asdict(result) for result in results]
  figures.write_json(workdir / "results.json", value)
  report.draw(workdir / "report.png", results)
  print(text)


if __name__ == "__main__":
  app.run(main)
