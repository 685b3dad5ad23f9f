"""Training runs that are started again and again; they share compiled programs."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Lives:
  """Processes of `experiments.train` with the quickstart's config.

  Args:
    root: where logs and compiled programs lie.
    workdirs: where the runs' directories lie.
    flags: of every run.
  """

  def __init__(self, root: pathlib.Path, workdirs: pathlib.Path, *flags: str):
    self.root, self.workdirs, self._flags = root, workdirs, flags
    self._environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

  def start(self, name: str, *flags: str) -> subprocess.Popen:
    """A life of run `name`; what it says goes to NAME.log."""
    with open(self.root / f"{name}.log", "a") as log:
      return subprocess.Popen(
        [sys.executable, "-m", "experiments.train", f"--workdir={self.workdirs / name}",
         "--config=experiments/configs/quickstart.py", *self._flags, *flags],
        cwd=ROOT, env=self._environment, stdout=log, stderr=log,
      )  # fmt: skip

  def said(self, name: str) -> str:
    """The end of a run's log."""
    return (self.root / f"{name}.log").read_text().strip()[-2000:]
