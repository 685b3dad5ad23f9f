"""Evaluates a checkpoint on held-out instances.

  python -m experiments.evaluate --config=experiments/configs/quickstart.py \\
    --workdir=runs/quickstart

Takes the newest checkpoint of WORKDIR, plays --config.eval.instances held-out instances and prints
one JSON line, which it also writes to WORKDIR/evaluation.json; WORKDIR/evaluation_episodes.jsonl
has the text of --config.transcripts of them. Other sampling: --config.sampling.temperature=0.7.

A foreign agent with another server in the policy's place (docs/guides/native.md); WORKDIR is any
directory, and no checkpoint is read:

  python -m experiments.evaluate --config=experiments/configs/native.py \\
    --workdir=runs/measured --config.native.endpoint=http://127.0.0.1:8001/v1
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import command_line

_CONFIG = config_flags.DEFINE_config_file(
  "config", lock_config=True, help_string="Settings: a Python file."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  logging.set_verbosity(logging.FATAL)  # orbax tells every failure before it raises
  from experiments import runner

  sys.exit(runner.evaluate(_CONFIG.value, pathlib.Path(_WORKDIR.value)))


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=command_line.parse)
