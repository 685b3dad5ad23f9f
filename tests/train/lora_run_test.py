"""Runs that train adapters alone, through the command line: the weights below stay as they were."""

import jax
import numpy as np
import pytest

from rome import models
from rome.rollout import Engine, Request
from rome.text import ByteTokenizer
from rome.train import checkpoints, replay
from rome.train.config import ConfigError, LoraConfig, MeshConfig, RunConfig
from tests.train.loop_test import environment, kill_and_resume, run

__all__ = ["environment"]
T = ByteTokenizer()
FLAGS = ["--config.lora.rank=2", "--config.lora.targets=('q_proj', 'o_proj')"]
CONFIG = models.PRESETS["micro"]


@pytest.mark.slow
def test_a_run_trains_adapters_alone(environment, tmp_path, capsys):
  base, whole, killed = (tmp_path / name for name in ("base", "whole", "killed"))
  done = run(environment, base, "--config.rl.steps=0")
  assert done.returncode == 0, done.stderr
  flags = [*FLAGS, f"--config.init_from={base}"]
  done = run(environment, whole, *flags)
  assert done.returncode == 0, done.stderr
  before, after = (
    checkpoints.load_params(max((path / "checkpoints").iterdir(), key=lambda p: int(p.name)))
    for path in (base, whole)
  )
  flat = jax.tree_util.tree_leaves_with_path(after)
  names = {path[-1].key for path, _ in flat}
  assert {"lora_a", "lora_b", "lora_alpha"} <= names
  plain = dict(jax.tree_util.tree_leaves_with_path(before))
  trained = 0
  for path, value in flat:
    if path[-1].key.startswith("lora_"):
      trained += path[-1].key == "lora_b" and bool(np.asarray(value).any())
    else:
      np.testing.assert_array_equal(value, plain[path])
  assert trained > 0
  assert replay.main([str(whole), "--step=3"]) == 0
  assert "everything is the same" in capsys.readouterr().out

  kill_and_resume(environment, whole, killed, *flags)
  # What was trained is where another run may begin, merged.
  further = run(environment, tmp_path / "further", f"--config.init_from={whole}")
  assert further.returncode == 0, further.stderr


def test_an_engine_samples_from_the_merged_weights():
  """With the log-probs of the forward pass that has them apart."""
  params = jax.jit(models.init_params, static_argnums=0)(CONFIG, jax.random.key(0))
  adapted = models.add_lora(CONFIG, params, jax.random.key(1), 2, 4.0, ["q_proj", "o_proj"])
  adapted = jax.tree_util.tree_map_with_path(
    lambda path, x: x + 0.1 if path[-1].key == "lora_b" else x, adapted
  )
  engine = Engine(CONFIG, slots=1, max_length=64, stop_tokens=(T.end,), steps=4)
  engine.publish(adapted, 0)
  context = tuple(T.encode("what is it"))
  engine.submit(Request(context=context, max_tokens=8, key=(0, 0)))
  reply = None
  while reply is None:
    reply = next((update.reply for update in engine.step() if update.reply), None)
  tokens = np.array([[*context, *reply.tokens]])
  ones, positions = np.ones_like(tokens), np.arange(tokens.shape[1])[None]

  def logps(weights):
    logits = models.forward(CONFIG, weights, tokens, ones, positions)
    return models.token_logps(logits, tokens, models.Sampling())[0][0, len(context) :]

  np.testing.assert_allclose(logps(adapted), reply.logps, atol=1e-4)
  assert np.abs(np.asarray(logps(params)) - reply.logps).max() > 1e-2


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"lora": LoraConfig(rank=-1)}, "config.lora.rank must be at least 0, got -1"),
    (
      {"lora": LoraConfig(alpha=2.0)},
      "config.lora.alpha must be 32.0 while lora.rank is 0, which it would not change, got 2.0",
    ),
    (
      {"lora": LoraConfig(rank=2), "mesh": MeshConfig(data=2)},
      "config.mesh must be one device, all sizes 1, with lora.rank",
    ),
  ],
)
def test_settings(settings, message):
  with pytest.raises(ConfigError, match=message):
    RunConfig(**settings)
