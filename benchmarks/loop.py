"""Speed of the whole loop: the quickstart's shapes, few updates, one JSON line.

  python -m benchmarks.loop

A short warm start first, so that replies look like replies; then tokens sampled and trained and
environment steps a second over the updates of reinforcement learning, and where the time went.
The first update compiles and is in the figures, as it is in a user's run.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import tempfile

from absl import app, flags, logging

from experiments import memory
from experiments.configs import quickstart

_WARM = flags.DEFINE_integer("warm_start", 80, "Updates of the warm start.", lower_bound=1)
_UPDATES = flags.DEFINE_integer("updates", 20, "Updates of reinforcement learning.", lower_bound=1)
_KEPT = ("speeds", "stage_shares", "peak_rss_mb", "wall_seconds", "sandbox_backend", "seed")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}")
  logging.set_verbosity(logging.WARNING)
  memory.keep_freed_memory()
  from rome.train import config as config_lib
  from rome.train import loop

  config = config_lib.from_config_dict(quickstart.get_config())
  config = dataclasses.replace(
    config,
    sft=dataclasses.replace(config.sft, steps=_WARM.value),
    rl=dataclasses.replace(config.rl, steps=_UPDATES.value, cooldown=0),
    eval=dataclasses.replace(config.eval, instances=36, plateau=1),
  )
  with tempfile.TemporaryDirectory(prefix="rome-bench-") as directory:
    run = loop.Run(config, pathlib.Path(directory))
    try:
      with contextlib.redirect_stdout(sys.stderr):
        summary = run.train()
    finally:
      run.close()
  row = {"benchmark": "loop", "warm_start": _WARM.value, "updates": _UPDATES.value}
  row |= {name: summary[name] for name in (*_KEPT, "device", "commit", "date")}
  print(json.dumps(row | {"load_1min": round(os.getloadavg()[0], 2)}), flush=True)


if __name__ == "__main__":
  app.run(main)
