"""Means over seeds with intervals, tables in Markdown, curves as one PNG."""

import datetime
import json
import math
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import stats

THRESHOLD = 0.8


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Mean over the first axis and its 95 % interval by Student's t; a single run has no interval."""
  values = np.asarray(values, float)
  n, mean = len(values), values.mean(axis=0)
  if n < 2:
    return mean, mean, mean
  half = stats.t.ppf(0.975, n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n)
  return mean, mean - half, mean + half


def show(
  values: Sequence[float] | np.ndarray, low: float = -math.inf, high: float = math.inf
) -> str:
  """Mean [interval], cut to the range that the quantity can have; no interval for one run."""
  mean, below, above = mean_interval(np.asarray(values))
  if len(values) < 2:
    return f"{mean:.3f}"
  return f"{mean:.3f} [{max(below, low):.3f}, {min(above, high):.3f}]"


def samples_to(curve: Sequence[float], samples_between: int) -> int | None:
  """Training episodes before the first evaluation at or above `THRESHOLD`; None: never."""
  for i, value in enumerate(curve):
    if value >= THRESHOLD:
      return i * samples_between
  return None


def show_samples(reached: Sequence[int | None]) -> str:
  """How many seeds got there, and the median over all of them (never counts as infinite)."""
  there = sorted(n for n in reached if n is not None)
  ordered = [*there, *[math.inf] * (len(reached) - len(there))]
  middle = (len(ordered) - 1) // 2
  median = (ordered[middle] + ordered[len(ordered) // 2]) / 2
  if not there:
    return f"never (0/{len(reached)})"
  spread = f"{there[0]} to {there[-1] if len(there) == len(reached) else 'never'}"
  shown = "never" if math.isinf(median) else f"{median:g}"
  return f"{shown} [{spread}] ({len(there)}/{len(reached)})"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table."""
  lines = [columns, ["---"] * len(columns), *rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(
  path: pathlib.Path,
  panels: Mapping[str, Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]],
  log_rows: Sequence[str] = (),
) -> None:
  """Draws a grid of panels with a line and a band for each label.

  Args:
    path: the PNG.
    panels: row title -> column title -> label -> (samples [T], values [seeds, T]).
    log_rows: rows with a logarithmic axis; the others show rates.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  columns = list(next(iter(panels.values())))
  figure, axes = pyplot.subplots(
    len(panels), len(columns), squeeze=False, figsize=(4.2 * len(columns), 2.9 * len(panels))
  )
  for row, (title, by_column) in enumerate(panels.items()):
    for column, name in enumerate(columns):
      axis = axes[row][column]
      for i, (label, (xs, values)) in enumerate(by_column[name].items()):
        mean, low, high = mean_interval(values)
        axis.plot(xs, mean, label=label, color=f"C{i % 10}", linewidth=1.2)
        if title in log_rows:
          low = np.maximum(low, mean / 10)  # an interval through 0 has no place on this axis
        axis.fill_between(xs, low, high, color=f"C{i % 10}", alpha=0.15, linewidth=0)
      if title in log_rows:
        axis.set_yscale("log")
      else:
        axis.set_ylim(-0.02, 1.02)
      axis.set_title(name if row == 0 else "", fontsize=10)
      axis.set_ylabel(title if column == 0 else "", fontsize=9)
      axis.set_xlabel("training episodes" if row == len(panels) - 1 else "", fontsize=9)
      axis.tick_params(labelsize=7)
  handles, labels = axes[0][0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="lower center", ncol=3, fontsize=8)
  legend_inches = 0.2 + 0.2 * math.ceil(len(labels) / 3)
  figure.tight_layout(rect=(0, legend_inches / figure.get_figheight(), 1, 1))
  figure.savefig(path, dpi=110, metadata={"Software": None})
  pyplot.close(figure)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file whole or not at all."""
  part = path.with_name(path.name + ".part")
  part.write_text(json.dumps(value, allow_nan=False) + "\n")
  os.replace(part, path)


def provenance() -> dict[str, str]:
  """Where and when, and of which source: "-dirty" where tracked files differ from the commit."""

  def git(*args: str) -> str:
    done = subprocess.run(
      ["git", *args], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()

  try:
    dirty = "-dirty" if git("status", "--porcelain", "-uno") else ""
    commit = git("rev-parse", "--short=12", "HEAD") + dirty
  except (OSError, subprocess.SubprocessError):
    commit = "unknown"
  return {
    "commit": commit,
    "date": datetime.date.today().isoformat(),
    "device": f"{jax.devices()[0].device_kind} ({os.cpu_count()} cores, {platform.machine()})",
    "jax": jax.__version__,
  }
