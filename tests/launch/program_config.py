"""Settings of program.py."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict({"seed": 0, "rl": {"lr": 0.1}, "sleep": 0.0, "status": 0})
