"""Playing numbered instances: the same twice, the right split, honest figures."""

import jax
import pytest

from rome import models
from rome.evals import wilson_interval
from rome.rollout import AgentConfig, SandboxConfig, TasksConfig
from rome.train import play
from rome.train.config import EngineConfig, RunConfig
from rome.trajectory import Valid

CONFIG = RunConfig(
  model="micro",
  tasks=TasksConfig(families=("count", "move")),
  sandbox=SandboxConfig(backend="bubblewrap"),
  agent=AgentConfig(max_turns=2, max_reply=4, context=128),
  engine=EngineConfig(slots=2, prefill_tokens=16, steps=4),
)
MODEL = models.PRESETS["micro"]


@pytest.fixture(scope="module")
def params():
  return jax.jit(models.init_params, static_argnums=0)(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def player():
  with play.Player(CONFIG, MODEL) as made:
    yield made


def bits(trajectories):
  return [(t.id, t.tokens.tobytes(), t.logps.tobytes()) for t in trajectories]


@pytest.mark.slow
def test_instances_by_number(player, params):
  trajectories, stats = player.play(
    params, jax.random.key(0), "train", 3, 5, play.RL_STREAM, version=9
  )
  want = ["count/2#4", "count/3#6", "move/1#3", "move/2#5", "move/3#7"]
  assert [t.id for t in trajectories] == want
  assert {int(v) for t in trajectories for v in t.versions} == {9}
  assert stats.env_steps == sum(t.num_chunks for t in trajectories)


def test_evaluations_repeat_and_look_at_held_out_instances(player, params):
  key = jax.random.key(0)
  figures, first = player.evaluate(params, key, 4)
  again, second = player.evaluate(params, key, 4)
  assert figures == again and bits(first) == bits(second)
  assert {t.task_id for t in first} == {
    *("count/1000000", "count/1000001", "move/1000000", "move/1000001")
  }
  wins = sum(t.reward == Valid(1.0) for t in first)
  assert figures["success"] == wins / 4 and figures["n"] == 4
  assert figures["interval"] == list(wilson_interval(wins, 4))
  assert {name: f["n"] for name, f in figures["families"].items()} == {"count": 2, "move": 2}


def test_training_and_evaluation_draw_differently(player, params):
  key = jax.random.key(0)
  streams = [player.play(params, key, "train", 0, 2, s, 0)[0] for s in (1, 2)]
  assert bits(streams[0]) != bits(streams[1])


def test_rates_by_hand():
  assert play._rate([True, False, True, True]) == {
    "success": 0.75, "interval": list(wilson_interval(3, 4)), "n": 4,
  }  # fmt: skip


def test_a_transcript_is_what_the_report_reads(player, params):
  (trajectory,), _ = player.play(params, jax.random.key(0), "train", 0, 1, 1, 0)
  row = play.transcript(trajectory, "before", 12)
  assert row.keys() == {
    *("phase", "step", "task_id", "family", "instruction", "success", "end_reason", "turns")
  }
  assert (row["phase"], row["step"], row["success"]) == ("before", 12, 0)
  assert len(row["turns"]) == trajectory.num_chunks
  assert row["turns"][0] == {
    "action": trajectory.turns[0].action,
    "observation": trajectory.turns[0].observation,
    "exit_code": trajectory.turns[0].exit_code,
  }
