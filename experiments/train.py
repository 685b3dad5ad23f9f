"""Trains a policy: warm start on demonstrations, then IPA in real sandboxes.

  python -m experiments.train --config=experiments/configs/quickstart.py --workdir=runs/quickstart

Single settings are overridden as --config.rl.steps=50. Leaves WORKDIR/checkpoints, metrics.jsonl,
episodes.jsonl, summary.json and report.html; started again on the same WORKDIR it goes on from the
last checkpoint.
"""

import pathlib
import signal
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import command_line, memory

_CONFIG = config_flags.DEFINE_config_file(
  "config", lock_config=True, help_string="Settings: a Python file."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run, made if missing.", required=True
)
_SANDBOX = flags.DEFINE_enum(
  "sandbox",
  None,
  ["auto", "podman", "bubblewrap", "process", "none"],
  "Sandbox backend; overrides config.sandbox.backend.",
)
_ACCEPT = flags.DEFINE_bool(
  "i_accept_no_isolation", False, "Allows --sandbox=process, which isolates nothing."
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Checks settings, paths, tasks and sandboxes, prints the memory plan, stops."
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  # A polite kill ends like Ctrl-C: sandboxes are removed on the way out.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  sys.stdout.reconfigure(line_buffering=True)  # in a log, what it says stands where it was said
  logging.set_verbosity(logging.FATAL)  # orbax tells every save, and every failure before it raises
  memory.keep_freed_memory()
  from experiments import runner  # jax and its threads come after the memory settings

  if _SANDBOX.value:
    _CONFIG.value.sandbox.backend = _SANDBOX.value
  if _ACCEPT.value:
    _CONFIG.value.sandbox.accept_no_isolation = True
  sys.exit(runner.train(_CONFIG.value, pathlib.Path(_WORKDIR.value), dry_run=_DRY_RUN.value))


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=command_line.parse)
