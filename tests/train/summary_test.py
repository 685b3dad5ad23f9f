"""The closing figures: taken from the cursor, nothing made up, and legible."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from rome.train import summary
from rome.train.config import RunConfig

CONFIG = RunConfig(seed=11, demonstrations=17)


def rate(success, low, high, n):
  return {"success": success, "interval": [low, high], "n": n}


def evaluation(a, b):
  return rate((a + b) / 2, 0.1, 0.9, 8) | {
    "families": {"count": rate(a, 0.0, 0.5, 4), "move": rate(b, 0.25, 0.75, 4)}
  }


def cursor(**sums):
  counts = ("sampled", "trained", "env_steps", "rollout", "wall", "generate", "env", "train")
  zeros = dict.fromkeys(counts, 0.0)
  return {
    "evals": {"plateau_1": evaluation(0.0, 0.25), "before": evaluation(0.25, 0.5),
              "after": evaluation(0.75, 1.0)},
    "wall": 12.34, "peak_rss_mb": 321, "backend": "bubblewrap", "sums": zeros | sums,
  }  # fmt: skip


PARAMS = {"a": np.arange(3, dtype=np.float32)}
BUSY = cursor(
  sampled=600, trained=900, env_steps=30, rollout=6.0, wall=20.0, generate=4.0, env=2.0, train=9.0
)


def summarise(cursor, params=PARAMS):
  return summary.summarise(CONFIG, params, cursor, pathlib.Path("/w/checkpoints/3"))


def test_every_figure_comes_from_the_run():
  made = summarise(BUSY)
  assert json.loads(json.dumps(made, allow_nan=False)) == made
  assert (made["success_before"], made["success_after"]) == (0.375, 0.875)
  assert made["success_before_interval"] == made["success_after_interval"] == [0.1, 0.9]
  assert made["families"]["move"] == {
    "before": 0.5, "before_interval": [0.25, 0.75], "after": 1.0, "after_interval": [0.25, 0.75],
    "n": 4,
  }  # fmt: skip
  assert made["plateau"] == {"plateau_1": 0.125, "before": 0.375}
  assert (made["instances"], made["demonstrations"], made["seed"]) == (8, 17, 11)
  assert (made["wall_seconds"], made["peak_rss_mb"]) == (12.3, 321)
  assert (made["sandbox_backend"], made["checkpoint"]) == ("bubblewrap", "/w/checkpoints/3")
  assert re.fullmatch("[0-9a-f]{64}", made["params_sha256"])
  assert re.fullmatch(r"\d{4}-\d\d-\d\d", made["date"]) and made["device"] and made["commit"]


def test_speeds_by_hand():
  made = summarise(BUSY)
  assert made["speeds"] == {
    "tokens_per_s_sampled": 100.0, "env_steps_per_s": 5.0, "tokens_per_s_trained": 100.0,
  }  # fmt: skip
  assert made["stage_shares"] == pytest.approx(
    {"generate": 0.2, "env": 0.1, "train": 0.45, "other": 0.25}
  )


def test_no_reinforcement_learning_has_no_speed():
  made = summarise(cursor())
  assert "speeds" not in made and "stage_shares" not in made


def test_the_hash_is_that_of_the_parameters():
  changed = {"a": np.nextafter(PARAMS["a"], 9, dtype=np.float32)}
  assert summarise(BUSY)["params_sha256"] == summarise(cursor())["params_sha256"]
  assert summarise(BUSY)["params_sha256"] != summarise(BUSY, changed)["params_sha256"]


@pytest.mark.slow
def test_peak_memory_only_grows():
  # In a process of its own: threads of this one allocate too, and its peak may be far behind it.
  program = """
import numpy as np
from rome.train import summary
before = summary.peak_rss_mb()
block = np.ones(200 << 17)  # 200 MiB, touched
during = summary.peak_rss_mb()
del block
print(before, during, summary.peak_rss_mb())
"""
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
  )
  before, during, after = map(int, done.stdout.split())
  # The kernel adds up what each thread counted lately: readings of one peak differ by a page or so.
  assert 10 < before < during <= after + 1 and 190 <= during - before <= 210


def test_the_table_shows_each_family_and_the_whole(capsys):
  summary.print_table(summarise(BUSY))
  lines = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
  assert ["count", "4", "0.25", "[0.00,", "0.50]", "0.75", "[0.00,", "0.50]"] in lines
  assert ["all", "8", "0.38", "[0.10,", "0.90]", "0.88", "[0.10,", "0.90]"] in lines
