"""A small real program with the flags of an experiment; what it does is said by its settings.

It starts a child of its own and writes both process ids, so that a test can see who is left.
"""

import json
import os
import pathlib
import subprocess
import time

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where to write.", required=True)
_NOTE = flags.DEFINE_string("note", "", "Goes into the summary.")


def main(_):
  config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  with subprocess.Popen(["sleep", "60"]) as child:
    (workdir / "pids").write_text(f"{os.getpid()} {child.pid}")
    print("running with seed", config.seed, flush=True)
    time.sleep(config.sleep)
    child.kill()
  if config.status:
    raise SystemExit(config.status)
  success = {"success_before": config.rl.lr, "success_after": config.seed / 10}
  (workdir / "summary.json").write_text(json.dumps({**success, "note": _NOTE.value}))


if __name__ == "__main__":
  app.run(main)
