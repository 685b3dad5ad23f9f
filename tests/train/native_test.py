"""Runs with a foreign agent: trained by the usual loop, made again by the usual replay."""

import os
import pathlib
import subprocess
import sys

import pytest

from experiments.configs import native
from rome.train import replay
from rome.train.config import from_config_dict
from rome.train.metrics import read_jsonl
from rome.train.settings import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
AGENT = (ROOT / "tests/rollout/native/curl.sh").read_text() + 'say "$ROME_INSTRUCTION"; say bye\n'
SMALL = [
  *("--config.model=micro", "--sandbox=bubblewrap", "--config.sandbox.image="),
  *("--config.native.install=", f"--config.native.command={AGENT}", "--config.transcripts=2"),
  *("--config.agent.context=160", "--config.row_length=160", "--config.agent.max_reply=12"),
  *("--config.agent.max_turns=3", "--config.engine.slots=4", "--config.eval.instances=2"),
  *("--config.rl.steps=2", "--config.rl.batch=4", "--config.rl.group_size=2"),
  *("--config.rl.micro_rows=4", "--config.experts.batch=2", "--config.ipa.failure_reward=-1.0"),
  "--config.numerics=exact",
]


@pytest.mark.slow
def test_a_run_is_trained_and_made_again(tmp_path, capsys):
  workdir = tmp_path / "run"
  done = subprocess.run(
    [sys.executable, "-m", "experiments.train", "--config=experiments/configs/native.py",
     f"--workdir={workdir}", *SMALL],
    cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=280,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  rows = [row for row in read_jsonl(workdir / "metrics.jsonl") if row["phase"] == "rl"]
  assert [row["step"] for row in rows] == [1, 2]
  for row in rows:
    assert row["mismatch_max"] == 0 and row["grad_norm"] > 0 and row["invalid"] == 0
  assert replay.main([str(workdir), "--step=2"]) == 0, capsys.readouterr()


@pytest.mark.parametrize(
  "name, value, message",
  [
    ("native.command", " ", "native.command must be what runs the agent"),
    ("native.port", 3128, "native.port must be from 1024 to 65535 and not 3128"),
    ("native.silence", 0.0, "native.silence must be above 0"),
    ("agent.system", "be good", "agent.system must be '' with agent.mode='native'"),
    ("agent.mode", "foreign", "agent.mode must be 'managed' or 'native'"),
    ("agent.mode", "managed", "native must be as it is by default with agent.mode='managed'"),
    ("rl.max_staleness", 1, "rl.max_staleness must be 0 with agent.mode='native'"),
    ("reward", "mine:reward", "reward must be '' with agent.mode='native'"),
  ],
)
def test_what_cannot_be_is_refused_by_name(name, value, message):
  config = native.get_config()
  config.update_from_flattened_dict({name: value})
  with pytest.raises(ConfigError, match=message):
    from_config_dict(config)
