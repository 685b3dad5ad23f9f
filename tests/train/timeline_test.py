"""The timeline of real runs: agrees with the timers, has every track, survives kill -9."""

import json

import jax
import pytest

from rome import models, rollout
from rome.rollout.timeline import BUSY, ENGINE, LANES, TRAINER
from rome.train import play
from tests.train import loop_test as loop
from tests.train.play_test import CONFIG

pytestmark = pytest.mark.slow
environment = loop.environment


def read(path):
  text = path.read_text()
  return json.loads(text if text.endswith("]\n") else text + "]")


def spans(found, track):
  return [e for e in found if e["ph"] == "X" and e["tid"] == track]


def check_tracks(found, lanes):
  """Every span has an end behind its start, and those of a lane or the engine do not overlap."""
  assert {e["tid"] for e in found if e["ph"] == "X"} == set(range(LANES + lanes))
  assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in found if e["ph"] == "X")
  for track in range(ENGINE, LANES + lanes):
    ordered = sorted(spans(found, track), key=lambda e: (e["ts"], e["ts"] + e["dur"]))
    for one, next_one in zip(ordered, ordered[1:], strict=False):
      assert one["ts"] + one["dur"] <= next_one["ts"] + 2, (one, next_one)  # whole microseconds


def test_spans_agree_with_the_timers(tmp_path):
  model = models.PRESETS[CONFIG.model]
  params = jax.jit(models.init_params, static_argnums=0)(model, jax.random.key(0))
  path = tmp_path / "timeline.json"
  timeline = rollout.Timeline(path, CONFIG.engine.slots)
  with play.Player(CONFIG, model, timeline) as player:
    _, stats = player.play(params, jax.random.key(0), "train", 0, 6, play.RL_STREAM, 0)
  timeline.close()
  found = read(path)
  engine = sum(e["dur"] for e in spans(found, ENGINE) if e["name"] == "step") / 1e6
  assert engine == pytest.approx(stats.generate_seconds, rel=0.05)
  waited = sum(e["dur"] for e in spans(found, ENGINE) if e["name"] == "waiting") / 1e6
  assert 0 < waited <= stats.env_wait_seconds + 1e-3
  lanes = [e for e in found if e["ph"] == "X" and e["tid"] >= LANES]
  names = [e["name"] for e in lanes]
  assert names.count("reset") == 6 and names.count("waiting") == stats.env_steps
  assert names.count("step") + names.count("tests") == stats.env_steps
  assert names.count("tests") == 6
  rows = [e["args"] for e in found if e["ph"] == "C"]
  assert max(row["running"] for row in rows) <= 2 and all(row["waiting"] >= 0 for row in rows)


@pytest.fixture(scope="module")
def killed(environment, tmp_path_factory):
  """A run killed within reinforcement learning: its directory."""
  workdir = tmp_path_factory.mktemp("runs") / "killed"
  process = loop.start(environment, workdir)
  loop.wait_until(process, lambda: len(loop.rows_of(workdir, "rl")) >= 3, "row 3 of rl")
  process.kill()
  process.communicate()
  return workdir


def test_a_run_tells_what_it_did_when(killed, environment):
  workdir = killed
  before = read(workdir / "timeline.json")
  marks = rollout.read_marks(workdir / "timeline.json")
  assert [m["step"] for m in marks if m["phase"] == "rl"] in ([1, 2], [1, 2, 3])
  again = loop.run(environment, workdir)
  assert again.returncode == 0, again.stderr
  found = read(workdir / "timeline.json")
  assert found[: len(before)] == before  # it was gone on with
  check_tracks(found, lanes=4)
  names = {e["name"] for e in spans(found, TRAINER)}
  assert names == {"demonstrations", "pack", "update", "checkpoint", "rollout", "evaluation"}
  # Shares of an update are those of the spans since the mark before.
  marks = [e for e in found if e["ph"] == "i"]
  before, last = [e for e in marks if e["args"]["phase"] == "rl"][-2:]
  assert marks.index(last) == marks.index(before) + 1
  mine = [e for e in found if e["ph"] == "X" and before["ts"] < e["ts"] < last["ts"]]
  for track, name in ((ENGINE, "engine"), (TRAINER, "trainer")):
    busy = sum(e["dur"] for e in mine if e["tid"] == track and e["name"] in BUSY[name]) / 1e6
    assert busy > 0
    told = last["args"]
    assert told["seconds"] * (1 - told[f"idle_{name}"]) == pytest.approx(busy, abs=0.01)
  # Of an update, generation and training share their time as its row says; other things differ.
  row = loop.rows_of(workdir, "rl")[-1]
  generated, trained = (
    sum(e["dur"] for e in mine if e["tid"] == track and e["name"] in names)
    for track, names in ((ENGINE, ("step",)), (TRAINER, ("pack", "score", "update")))
  )
  wanted = row["share_generate"] / (row["share_generate"] + row["share_train"])
  assert generated / (generated + trained) == pytest.approx(wanted, abs=0.1)
  (trained,) = (e for e in mine if e["tid"] == TRAINER and e["name"] == "update")
  (rolled,) = (e for e in mine if e["tid"] == TRAINER and e["name"] == "rollout")
  steps = [e for e in mine if e["tid"] == ENGINE and e["name"] == "step"]
  assert all(
    rolled["ts"] <= e["ts"] <= rolled["ts"] + rolled["dur"] <= trained["ts"] for e in steps
  )
  page = (workdir / "report.html").read_text()
  assert "Idle share of an update" in page and "timeline.json" in page
