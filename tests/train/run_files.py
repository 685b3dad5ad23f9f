"""Writes the files of a run for the tests of its report: made-up figures, in the real formats."""

import json
import math
import pathlib
import random
from typing import Any

from rome.evals import wilson_interval
from rome.train import metrics

FAMILIES = ("count", "edit", "extract", "find", "permissions")
HOSTILE = (
  "</pre></script><script>document.title='hacked'</script><img src=x onerror=alert(1)>\x1b[0m"
)


def write_run(workdir: pathlib.Path, *, finished: bool = True, updates: int = 80) -> None:
  """A warm start, RL and evaluations in WORKDIR; without a summary where it has not finished."""
  rng = random.Random(0)
  with metrics.MetricsWriter(workdir) as writer:
    for step in range(0, 300, 10):
      decay = math.exp(-step / 60)
      row = {"loss": 4 * decay + 0.05, "accuracy": 1 - 0.9 * decay, "grad_norm": 1 + decay}
      writer.write("sft", step, row)
    for k, step in enumerate((100, 200), start=1):
      writer.write("eval", step, {"name": f"plateau_{k}", **_rate([60, 76][k - 1])})
    writer.write("eval", 290, {"name": "before", **_rate(80), **dict.fromkeys(_families(), 0.4)})
    for step in range(1, updates + 1):
      writer.write("rl", step, _rl_row(step, updates, rng))
    if finished:
      writer.write("eval", updates, {"name": "after", **_rate(190)})
  with metrics.JsonlFile(workdir / "episodes.jsonl") as file:
    for episode in _episodes():
      file.append(episode)
  if finished:
    (workdir / "summary.json").write_text(json.dumps(_summary()))
    (workdir / "config.json").write_text(json.dumps({"seed": 3, "train": {"lr": 1e-3}}))


def _families() -> list[str]:
  return [f"family_{name}" for name in FAMILIES]


def _rate(successes: int, n: int = 200) -> dict[str, Any]:
  low, high = wilson_interval(successes, n)
  return {"success": successes / n, "low": low, "high": high, "n": n}


def _rl_row(step: int, updates: int, rng: random.Random) -> dict[str, Any]:
  done = 1 - math.exp(-3 * step / updates)
  return {
    "success": min(1.0, max(0.0, 0.4 + 0.57 * done + rng.gauss(0, 0.05))),
    "grad_norm": math.exp(rng.gauss(-3, 0.5)) * (40 if step == 33 else 1),
    "loss": rng.gauss(0, 0.1),
    "reply_length": 30.0,
    "reply_length_positive": 28 + rng.gauss(0, 1),
    "reply_length_negative": 40 + 10 * done + rng.gauss(0, 2) if step < 70 else None,
    "mismatch_mean": 1e-6 * (1 + rng.random()),
    "mismatch_max": 3e-5 * (1 + rng.random()),
    **{f"mismatch_part_{p}": 1e-6 * (p + 1) for p in range(metrics.MISMATCH_PARTS)},
    "entropy": 0.4 * (1 - 0.8 * done),
    "masked_share": 0.02 * rng.random(),
    "truncated_share": 0.05 * rng.random(),
    "filtered": rng.randrange(4),
    "invalid": int(step == 20),
    "tokens_per_s_sampled": 900 + 50 * rng.random(),
    "tokens_per_s_trained": 4000 + 300 * rng.random(),
    "share_generate": 0.55,
    "share_env": 0.15,
    "share_train": 0.25,
    "share_other": 0.05,
    "lr": 1e-3,
  }


def _episodes() -> list[dict[str, Any]]:
  turns = [
    {
      "action": "I look first.<|call|>sh ls -la notes",
      "observation": "total 8\n-rw-r--r-- 1 agent agent 12 a.txt\n-rw------- 1 agent agent 9 b\n",
      "exit_code": 0,
    },
    {"action": "<|call|>sh wc -l < notes/a.txt > answer.txt", "observation": "", "exit_code": 0},
    {"action": "<|call|>submit", "observation": "", "exit_code": None},
  ]
  common = {"phase": "eval", "step": 80, "family": "count", "end_reason": "submitted"}
  ask = "Count the lines of notes/a.txt and write the number to answer.txt."
  hostile = [{"action": HOSTILE, "observation": HOSTILE + "\ud800\u202e", "exit_code": 127}]
  return [
    {**common, "task_id": "edit/7", "instruction": HOSTILE, "success": 0, "turns": hostile},
    {**common, "task_id": "find/9", "instruction": ask, "success": None, "turns": turns[:1]},
    {**common, "task_id": "count/12", "instruction": ask, "success": 1, "turns": turns},
  ]


def _summary() -> dict[str, Any]:
  families = {
    name: {
      "before": k / 40,
      "before_interval": wilson_interval(k, 40),
      "after": (38 + k % 3) / 40,
      "after_interval": wilson_interval(38 + k % 3, 40),
      "n": 40,
    }
    for name, k in zip(FAMILIES, (10, 20, 4, 30, 16), strict=True)
  }
  return {
    "success_before": 0.4,
    "success_before_interval": wilson_interval(80, 200),
    "success_after": 0.95,
    "success_after_interval": wilson_interval(190, 200),
    "families": families,
    "wall_seconds": 402.5,
    "peak_rss_mb": 3100,
    "sandbox_backend": "podman",
    "seed": 3,
    "params_sha256": "0" * 64,
    "commit": "abc1234",
    "device": "cpu",
    "date": "2026-01-01T00:00:00Z",
    "checkpoint": "checkpoints/80",
    "stage_shares": {"generate": 0.55, "env": 0.15, "train": 0.25, "other": 0.05},
    "speeds": {"tokens_per_s_sampled": 930, "tokens_per_s_trained": 4100, "env_steps_per_s": 61},
  }
