"""Puts finished runs side by side as a Markdown table.

  python -m experiments.compare runs/a runs/b ...

Each argument is a work directory or a copy of its summary.json; figures are the runs' own.
"""

import json
import pathlib
import sys

from absl import app

COLUMNS = ("run", "seed", "before [95 %]", "after [95 %]", "wall s", "peak MB", "backend", "params")


def main(argv: list[str]) -> None:
  if len(argv) < 2:
    raise app.UsageError("name at least one work directory or summary.json")
  rows = [_row(pathlib.Path(name)) for name in argv[1:]]
  print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
  for row in rows:
    print("| " + " | ".join(row) + " |")


def _row(path: pathlib.Path) -> list[str]:
  file = path / "summary.json" if path.is_dir() else path
  try:
    summary = json.loads(file.read_text())
  except (OSError, ValueError) as error:
    sys.exit(f"error: {file} is no summary of a finished run ({error})")
  name = file.parent.name if path.is_dir() else file.stem
  rate = "{:.3f} [{:.3f}, {:.3f}]".format
  before = rate(summary["success_before"], *summary["success_before_interval"])
  after = rate(summary["success_after"], *summary["success_after_interval"])
  return [
    name, str(summary["seed"]), before, after, f"{summary['wall_seconds']:.0f}",
    str(summary["peak_rss_mb"]), summary["sandbox_backend"], f"`{summary['params_sha256'][:12]}`",
  ]  # fmt: skip


if __name__ == "__main__":
  app.run(main)
