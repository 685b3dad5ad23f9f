"""What asynchronous training gains where rollout waits for tools: one JSON line.

  python -m benchmarks.overlap [--updates=40] [--scale=1.0] [--workdir=DIR]
  python -m benchmarks.overlap --record     # records the latencies anew

The quickstart's tasks in real sandboxes, with a wait in front of every action: latencies of real
tool calls of a coding agent in this repository (searches, edits, builds, tests, type checks),
recorded on one machine and kept in `tool_latencies.json`; which one an action waits for follows
from its task and turn. One warm start, then reinforcement learning from the same weights with
rl.max_staleness=0 and 1, each in a process of its own, one after the other. Told are seconds of all
updates, the share of its time that synchronous rollout waited, held-out success after it with its
interval, and the same two seconds without any waits (CPU-bound).
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from absl import app, flags

from benchmarks._tool_latencies import ROOT, SCALE_VARIABLE, read, record
from rome.train.metrics import read_jsonl
from rome.train.summary import provenance

_RECORD = flags.DEFINE_bool("record", False, "Record latencies and stop.")
_UPDATES = flags.DEFINE_integer("updates", 40, "Updates of each run.", lower_bound=1)
_SCALE = flags.DEFINE_float("scale", 1.0, "Multiplies the latencies.", lower_bound=0.0)
_WARM = flags.DEFINE_integer("warm_updates", 280, "Updates of the warm start.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs stay; a temporary directory else.")


def train(workdir: pathlib.Path, scale: float, *settings: str) -> dict[str, Any]:
  """One run; its summary, rows of RL, and the seconds from its first evaluation to the last row."""
  command = [
    *(sys.executable, "-m", "experiments.train", "--config=experiments/configs/quickstart.py"),
    *(
      f"--workdir={workdir}",
      "--sandbox=bubblewrap",
      "--config.tasks.env=benchmarks._tool_latencies:Delayed",
    ),
    *settings,
  ]
  environment = os.environ | {SCALE_VARIABLE: str(scale)}
  subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=True)
  rows = read_jsonl(workdir / "metrics.jsonl")
  reinforced = [row for row in rows if row["phase"] == "rl"]
  before = [row for row in rows if row["phase"] == "eval" and row["name"] == "before"]
  summary = json.loads((workdir / "summary.json").read_text())
  seconds = reinforced[-1]["wall"] - before[0]["wall"] if reinforced else 0.0
  return {"summary": summary, "rows": reinforced, "seconds": seconds}


def compare(base: pathlib.Path, warm: pathlib.Path, scale: float, updates: int) -> dict[str, Any]:
  """Synchronous and asynchronous runs from the same weights."""
  result: dict[str, Any] = {}
  for name, staleness in (("sync", 0), ("async", 1)):
    done = train(
      base / f"{name}_{scale:g}",
      scale,
      *(f"--config.init_from={warm}", "--config.sft.steps=0", f"--config.rl.steps={updates}"),
      *(f"--config.rl.max_staleness={staleness}", "--config.rl.cooldown=0"),
    )
    rows, summary = done["rows"], done["summary"]
    result[f"{name}_s"] = round(done["seconds"], 1)
    result[f"{name}_success"] = round(summary["success_after"], 3)
    result[f"{name}_interval"] = [round(x, 3) for x in summary["success_after_interval"]]
    result[f"{name}_dropped"] = sum(row["dropped"] for row in rows)
    if not staleness:
      result["success_before"] = round(summary["success_before"], 3)
      waits = sum(row["share_env"] / max(row["share_env"] + row["share_generate"], 1e-9)
                  for row in rows)  # fmt: skip
      result["rollout_waits"] = round(waits / len(rows), 3)
    else:
      result["staleness_mean"] = round(sum(row["staleness"] for row in rows) / len(rows), 3)
  result["ratio"] = round(result["async_s"] / result["sync_s"], 3)
  return result


def main(_: list[str]) -> None:
  if _RECORD.value:
    record()
    return
  with tempfile.TemporaryDirectory() as temporary:
    base = pathlib.Path(_WORKDIR.value or temporary)
    warm = base / "warm"
    train(warm, 0.0, f"--config.sft.steps={_WARM.value}", "--config.rl.steps=0")
    waiting = compare(base, warm, _SCALE.value, _UPDATES.value)
    bound = compare(base, warm, 0.0, _UPDATES.value)
  recorded = read()
  seconds = sorted(one["seconds"] for one in recorded["calls"])
  print(
    json.dumps(
      {
        "benchmark": "overlap",
        "updates": _UPDATES.value,
        "scale": _SCALE.value,
        "latencies_recorded": recorded["date"],
        "latency_median_s": seconds[len(seconds) // 2],
        "latency_mean_s": round(sum(seconds) / len(seconds), 3),
        "latency_max_s": seconds[-1],
        **waiting,
        **{f"cpu_bound_{name}": bound[name] for name in ("sync_s", "async_s", "ratio")},
        "seed": 0,
        **provenance(),
      }
    )
  )


if __name__ == "__main__":
  app.run(main)
