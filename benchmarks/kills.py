"""kill -9 at random moments of a run that is started again each time: prints one JSON line.

  python -m benchmarks.kills [--kills=20 --seed=0 --damage=0.25 --updates=40]

A tiny synchronous run goes to its end twice, undisturbed: what they write must be the same apart
from `metrics.CLOCK`. A third one is killed at moments drawn from the seed: a quarter of the kills
come while it starts, the others up to three seconds after its first new row, so that they fall into
updates, evaluations and saves. After some the newest checkpoint is damaged, as long as an older one
is whole. It has to end with the bits, rows and episodes of the others, and without sandboxes of the
killed processes; where it ends before the last kill, another one takes its place. Exits with status
1 where something differs or is left.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags

from benchmarks._lives import Lives
from rome.envs import owner, sandbox_cli
from rome.train import metrics

_KILLS = flags.DEFINE_integer("kills", 20, "How many.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments and of the damages.")
_DAMAGE = flags.DEFINE_float("damage", 0.25, "Share of kills that damage a checkpoint.")
_UPDATES = flags.DEFINE_integer("updates", 40, "Of reinforcement learning.", lower_bound=2)
_BACKEND = flags.DEFINE_enum("backend", "bubblewrap", ["bubblewrap", "podman"], "Of the sandboxes.")
_STARTING = 0.25  # share of kills that come during a start
_LONGEST = 3.0  # seconds of work before a kill
_LIMIT = 300.0  # seconds that a life may take
_SETTINGS = (
  *("--config.model=micro", "--config.demonstrations=6", "--config.transcripts=2"),
  *("--config.engine.slots=4", "--config.eval.instances=4", "--config.eval.plateau=2"),
  *("--config.sft.steps=6", "--config.sft.batch=4", "--config.sft.micro_rows=2"),
  *("--config.sft.log_every=1", "--config.sft.checkpoint_every=2", "--config.experts.batch=2"),
  *("--config.rl.batch=6", "--config.rl.micro_rows=2", "--config.rl.checkpoint_every=2"),
  "--config.ipa.failure_reward=-1.0",  # failures alone would leave the weights as they are
)


class Runs(Lives):
  """Runs of one configuration below `root`."""

  def __init__(self, root: pathlib.Path, updates: int, backend: str):
    super().__init__(root, root, *_SETTINGS, f"--config.rl.steps={updates}", f"--sandbox={backend}")

  def finish(self, name: str) -> float:
    """Carries run `name` to its end; seconds until its first row. Raises as `await_row`."""
    process, began = self.start(name), time.monotonic()
    self.await_row(name, process)
    first = time.monotonic() - began
    process.wait(_LIMIT)
    self._check(name, process)
    return first

  def await_row(self, name: str, process: subprocess.Popen) -> None:
    """Returns when a life has written a row, or has ended well.

    Raises:
      RuntimeError: it failed; with the end of what it said.
    """
    # A start cuts the file back before it adds to it.
    path, least, began = self.root / name / "metrics.jsonl", None, time.monotonic()
    while process.poll() is None and time.monotonic() < began + _LIMIT:
      size = path.stat().st_size if path.exists() else 0
      if least is not None and size > least:
        return
      least = size if least is None else min(least, size)
      time.sleep(0.01)
    self._check(name, process)

  def _check(self, name: str, process: subprocess.Popen) -> None:
    if process.poll() != 0:
      process.kill()
      raise RuntimeError(f"run {name} ended with {process.poll()}: {self.said(name)}")

  def result(self, name: str) -> dict[str, Any]:
    """What a run left, without what the clock says."""
    workdir = self.root / name
    return {
      "params": json.loads((workdir / "summary.json").read_text())["params_sha256"],
      "metrics": metrics.repeatable(metrics.read_jsonl(workdir / "metrics.jsonl")),
      "episodes": metrics.read_jsonl(workdir / "episodes.jsonl"),
      "records": sorted(path.name for path in (workdir / "updates").iterdir()),
    }

  def checkpoints(self, name: str) -> list[pathlib.Path]:
    """Those of a run that bear their own names, oldest first."""
    folder = self.root / name / "checkpoints"
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def kill(runs: Runs, name: str, starting: bool, after: float) -> tuple[str, bool]:
  """A life that is killed `after` seconds, counted from its first row unless it is `starting`.

  Returns:
    The label of its sandboxes, and whether it was alive until then.
  """
  process = runs.start(name)
  label = owner.label(process.pid)
  try:
    if not starting:
      runs.await_row(name, process)
    process.wait(after)
    return label, False
  except subprocess.TimeoutExpired:
    return label, True
  finally:
    process.kill()
    process.wait()


def damage(path: pathlib.Path) -> None:
  """Cuts the largest file of a checkpoint in half."""
  file = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  os.truncate(file, file.stat().st_size // 2)


def owned(labels: set[str]) -> list[str]:
  """Sandboxes that belong to these processes, or that these leave on the host."""
  found = {**sandbox_cli.owned_directories(), **sandbox_cli.owned_containers()}
  return sorted(name for name, label in found.items() if label in labels)


def chaos(runs: Runs, kills: int, start: float, seed: int, share: float) -> dict[str, Any]:
  """Kills a run again and again, then lets it end; what happened on the way."""
  rng, labels, bad, names = random.Random(seed), set(), set(), ["killed1"]
  while len(labels) < kills:
    name, starting = names[-1], rng.random() < _STARTING
    after = rng.random() * (start if starting else _LONGEST)
    label, alive = kill(runs, name, starting, after)
    if not alive:
      names.append(f"killed{len(names) + 1}")
      continue
    labels.add(label)
    here = runs.checkpoints(name)
    whole = [path for path in here if path.stat().st_ino not in bad]
    if rng.random() < share and len(whole) > 1 and whole[-1] == here[-1]:
      bad.add(whole[-1].stat().st_ino)  # which a new name does not change
      damage(whole[-1])
  runs.finish(names[-1])
  aside = {p.stat().st_ino for name in names for p in runs.root.glob(f"{name}/*/*.damaged*")}
  logs = [(runs.root / f"{name}.log").read_text() for name in names]
  return {
    "runs": names,
    "kills": len(labels),
    "resumed": sum(log.count("resuming") for log in logs),
    "damaged": len(bad),
    "set_aside": len(aside & bad),
    "wrongly_set_aside": len(aside - bad),
    "left_sandboxes": owned(labels),
  }


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}")
  began = time.monotonic()
  with tempfile.TemporaryDirectory(prefix="rome-kills-") as directory:
    runs = Runs(pathlib.Path(directory), _UPDATES.value, _BACKEND.value)
    runs.finish("first")
    start = runs.finish("second")
    told = chaos(runs, _KILLS.value, start, _SEED.value, _DAMAGE.value)
    first, second, *killed = (runs.result(name) for name in ("first", "second", *told["runs"]))
    summary = json.loads((runs.root / "second" / "summary.json").read_text())
  rows = [
    [(row["phase"], row["step"], row.get("name")) for row in run["metrics"]] for run in killed
  ]
  row = {"benchmark": "kills", "updates": _UPDATES.value, "seed": _SEED.value} | told
  row |= {f"two_runs_same_{part}": first[part] == second[part] for part in first}
  row |= {f"killed_same_{part}": all(first[part] == run[part] for run in killed) for part in first}
  row |= {"rows": len(rows[-1]), "doubled_rows": sum(len(r) - len(set(r)) for r in rows)}
  row |= {name: summary[name] for name in ("sandbox_backend", "device", "commit", "date")}
  row |= {"start_seconds": round(start, 1), "seconds": round(time.monotonic() - began, 1)}
  print(json.dumps(row | {"load_1min": round(os.getloadavg()[0], 2)}), flush=True)
  good = all(value for name, value in row.items() if "_same_" in name)
  good &= not (row["left_sandboxes"] or row["doubled_rows"] or row["wrongly_set_aside"])
  sys.exit(0 if good else 1)


if __name__ == "__main__":
  app.run(main)
