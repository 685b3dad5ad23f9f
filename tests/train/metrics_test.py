"""Rows survive kills and resumes; nothing that is not a finite number gets in; shares add up."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from rome.train import metrics


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self) -> float:
    return self.now


def scalars(workdir) -> list[tuple[str, int, float]]:
  """What TensorBoard would show: the scalars of every event file under workdir."""
  found = []
  for path in sorted((workdir / "tensorboard").iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):
      size = int.from_bytes(data[at : at + 8], "little")
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
      found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
      at += 16 + size
  return found


@pytest.fixture
def clock():
  return Clock()


@pytest.fixture
def writer(tmp_path, clock):
  with metrics.MetricsWriter(tmp_path, clock) as writer:
    yield writer


def test_rows_are_plain_json(tmp_path, clock, writer):
  clock.now += 1.5
  writer.write("rl", 3, {"loss": jnp.float32(0.5), "n": np.int64(7), "name": "after", "gone": None})
  text = (tmp_path / "metrics.jsonl").read_text()
  assert text == '{"phase": "rl", "step": 3, "wall": 1.5, "loss": 0.5, "n": 7, "name": "after"}\n'
  writer.close()
  assert sorted(scalars(tmp_path)) == [("rl/loss", 3, 0.5), ("rl/n", 3, 7.0), ("rl/wall", 3, 1.5)]


@pytest.mark.parametrize("value", [float("nan"), np.float32("inf"), jnp.array(-jnp.inf)])
def test_non_finite_is_refused_by_name(tmp_path, writer, value):
  with pytest.raises(FloatingPointError, match="metric grad_norm of rl step 4"):
    writer.write("rl", 4, {"loss": 1.0, "grad_norm": value})
  assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_not_a_number_is_refused_by_name(writer):
  with pytest.raises(TypeError, match="metric loss"):
    writer.write("rl", 0, {"loss": [1.0, 2.0]})


def test_resume_forgets_what_came_after_the_checkpoint(tmp_path, clock, writer):
  clock.now += 10
  writer.write("rl", 1, {"loss": 1.0})
  position = writer.position()
  kept = (tmp_path / "metrics.jsonl").read_bytes()
  clock.now += 10
  writer.write("rl", 2, {"loss": 2.0})
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"phase": "rl", "st')  # Killed while writing.

  resumed = metrics.MetricsWriter(tmp_path, clock)
  resumed.restore(position)
  assert (tmp_path / "metrics.jsonl").read_bytes() == kept
  clock.now += 5
  row = resumed.write("rl", 2, {"loss": 3.0})
  assert row["wall"] == 15.0
  resumed.close()
  losses = [(step, value) for tag, step, value in scalars(tmp_path) if tag == "rl/loss"]
  assert losses == [(1, 1.0), (2, 3.0)]


@pytest.mark.parametrize("position", [-1, 3, 10_000])
def test_restore_refuses_what_is_no_end_of_a_row(tmp_path, writer, position):
  writer.write("rl", 1, {"loss": 1.0})
  with pytest.raises(metrics.JsonlError, match=f"no row ends at byte {position}"):
    writer.restore(position)
  assert len(metrics.read_jsonl(tmp_path / "metrics.jsonl")) == 1


def test_restore_to_nothing(tmp_path, writer):
  writer.write("rl", 1, {"loss": 1.0})
  writer.restore(0)
  assert metrics.read_jsonl(tmp_path / "metrics.jsonl") == []


def test_a_torn_last_line_is_dropped_on_opening(tmp_path):
  path = tmp_path / "episodes.jsonl"
  path.write_bytes(b'{"a": 1}\n{"a"')
  with metrics.JsonlFile(path) as file:
    file.append({"a": 2})
  assert metrics.read_jsonl(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("line", ["{oops", "[1]", "", "\x00"])
def test_garbled_lines_are_named(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  path.write_text(json.dumps({"a": 1}) + "\n" + line + "\n")
  with pytest.raises(metrics.JsonlError, match="metrics.jsonl, line 2: not"):
    metrics.read_jsonl(path)


def test_stage_shares(clock):
  timer = metrics.StageTimer(clock)
  with timer.stage("generate"):
    clock.now += 6
  with pytest.raises(RuntimeError), timer.stage("train"):
    clock.now += 2
    raise RuntimeError
  timer.add("env", 1)
  clock.now += 2
  shares = timer.shares()
  assert shares == pytest.approx(
    {"share_generate": 0.6, "share_env": 0.1, "share_train": 0.2, "share_other": 0.1}
  )
  assert timer.rate(300, "generate") == 50
  assert timer.total() == 10
  timer.reset()
  assert timer.rate(300, "generate") is None
  assert timer.shares()["share_other"] == 1.0


def test_unknown_stage():
  with pytest.raises(KeyError, match="no stage 'sleep'; stages are generate, env, train"):
    metrics.StageTimer().add("sleep", 1.0)
