"""What a finished run says of itself: summary.json and the closing table."""

import datetime
import os
import pathlib
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

import chex
import jax
from rich.console import Console
from rich.table import Table

from rome.train.checkpoints import tree_sha256
from rome.train.config import RunConfig


def peak_rss_mb() -> int:
  """Peak resident memory of this process since it started, MiB.

  Sandboxes are not in it, their caps bound them.
  """
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.split("VmHWM:")[1].split()[0]) >> 10


def summarise(
  config: RunConfig, params: chex.ArrayTree, cursor: dict[str, Any], checkpoint: pathlib.Path
) -> dict[str, Any]:
  """The figures of a finished run, as JSON values."""
  before, after = cursor["evals"]["before"], cursor["evals"]["after"]
  families = {
    name: {
      "before": before["families"][name]["success"],
      "before_interval": before["families"][name]["interval"],
      "after": figures["success"],
      "after_interval": figures["interval"],
      "n": figures["n"],
    }
    for name, figures in after["families"].items()
  }
  return {
    "success_before": before["success"],
    "success_before_interval": before["interval"],
    "success_after": after["success"],
    "success_after_interval": after["interval"],
    "plateau": {
      name: figures["success"] for name, figures in cursor["evals"].items() if name != "after"
    },
    "families": families,
    "instances": after["n"],
    "demonstrations": config.demonstrations,
    "wall_seconds": round(cursor["wall"], 1),
    "peak_rss_mb": cursor["peak_rss_mb"],
    "sandbox_backend": cursor["backend"],
    "seed": config.seed,
    "params_sha256": tree_sha256(params),
    "checkpoint": str(checkpoint),
    **_speeds(cursor["sums"]),
    **provenance(),
  }


def provenance() -> dict[str, str]:
  """What every published figure says of where it comes from: device, commit, date."""
  return {
    "device": _device(),
    "commit": _commit(),
    "date": datetime.date.today().isoformat(),
  }


def _speeds(sums: dict[str, float]) -> dict[str, Any]:
  """Rates and stage shares over the whole of reinforcement learning; empty where there was none."""
  if not sums["wall"]:
    return {}
  shares = {stage: sums[stage] / sums["wall"] for stage in ("generate", "env", "train")}
  return {
    "speeds": {
      "tokens_per_s_sampled": sums["sampled"] / sums["rollout"],
      "env_steps_per_s": sums["env_steps"] / sums["rollout"],
      "tokens_per_s_trained": sums["trained"] / sums["train"],
    },
    "stage_shares": shares | {"other": 1 - sum(shares.values())},
  }


def print_table(summary: dict[str, Any]) -> None:
  """The closing table: held-out success before and after, per family, with 95 % intervals."""
  table = Table(title=f"success on {summary['instances']} held-out instances (95 % interval)")
  for column in ("family", "n", "before", "after"):
    table.add_column(column, justify="left" if column == "family" else "right")
  for name, f in summary["families"].items():
    table.add_row(
      name,
      str(f["n"]),
      _cell(f["before"], f["before_interval"]),
      _cell(f["after"], f["after_interval"]),
    )
  table.add_section()
  table.add_row(
    "all",
    str(summary["instances"]),
    _cell(summary["success_before"], summary["success_before_interval"]),
    _cell(summary["success_after"], summary["success_after_interval"]),
  )
  Console().print(table)


def _cell(rate: float, interval: Sequence[float]) -> str:
  return f"{rate:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _device() -> str:
  device = jax.devices()[0]
  return (
    f"{device.device_kind} x{jax.device_count()} ({os.cpu_count()} cores, {platform.machine()})"
  )


def _commit() -> str:
  """The source's commit, "-dirty" where files differ from it, "unknown" outside a checkout."""
  try:
    dirty = "-dirty" if _git("status", "--porcelain", "-uno") else ""
    return _git("rev-parse", "--short=12", "HEAD") + dirty
  except (OSError, subprocess.SubprocessError):
    return "unknown"


def _git(*args: str) -> str:
  done = subprocess.run(
    ["git", *args],
    cwd=pathlib.Path(__file__).parent,
    capture_output=True,
    text=True,
    timeout=10,
    check=True,
  )
  return done.stdout.strip()
