"""Trains a policy: warm start on demonstrations, then IPA in real sandboxes.

  python -m experiments.train --config=experiments/configs/quickstart.py --workdir=runs/quickstart

Several processes train one policy (docs/guides/multiprocess.md): start each with the same flags and
its own number, --coordinator=HOST:PORT --num_processes=N --process_id=I --config.mesh.data=-1.

Single settings are overridden as --config.rl.steps=50. Leaves WORKDIR/checkpoints, metrics.jsonl,
episodes.jsonl, summary.json and report.html; started again on the same WORKDIR it goes on from the
last checkpoint.
"""

import pathlib
import signal
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import command_line, memory, processes

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
  "dry_run",
  False,
  "Checks settings, mesh, trackers, paths, tasks and sandboxes, prints the memory plan, stops.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "For several processes: HOST:PORT, a free port on the host of process 0, which the others reach; "
  "or auto, where jax finds all three from the scheduler (Slurm, Open MPI, cloud TPU). WORKDIR has "
  "to be the same directory for all.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Processes of the run, with --coordinator=HOST:PORT.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which of them this one is, from 0.", lower_bound=0
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  # A polite kill ends like Ctrl-C: sandboxes are removed on the way out.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  sys.stdout.reconfigure(line_buffering=True)  # in a log, what it says stands where it was said
  logging.set_verbosity(logging.FATAL)  # orbax tells every save, and every failure before it raises
  memory.keep_freed_memory()
  sys.exit(processes.run(_train, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value))


def _train() -> int:
  from experiments import runner  # jax and its threads come after the memory settings

  if _SANDBOX.value:
    _CONFIG.value.sandbox.backend = _SANDBOX.value
  if _ACCEPT.value:
    _CONFIG.value.sandbox.accept_no_isolation = True
  return runner.train(_CONFIG.value, pathlib.Path(_WORKDIR.value), dry_run=_DRY_RUN.value)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=command_line.parse)
