"""An update that is not finite names its trajectories and leaves them to be looked at."""

import json

import jax
import numpy as np
import pytest

from rome import ipa
from rome.rollout import pack
from rome.train import nonfinite
from rome.train.config import ExpertsConfig, RLConfig, RunConfig, StageConfig
from rome.train.learner import Learner
from rome.train.step import NonFinite
from rome.trajectory import Valid
from tests.train import loop_test as loop
from tests.trajectories import make

environment = loop.environment
LOGP = -5.5
STAGE = {"batch": 6, "learning_rate": 1e-3, "micro_rows": 2}
CONFIG = RunConfig(
  model="micro",
  row_length=160,
  sft=StageConfig(steps=9, **STAGE),
  rl=RLConfig(steps=9, **STAGE),
  ipa=ipa.IPAConfig(lambda_il=1.0),
  experts=ExpertsConfig(batch=2),
)


def episodes(rewards, length=60):
  """Two a row of 160 tokens, two rows a micro-batch."""
  return [
    make(f"t#{i}", [(length // 2, length // 2)], Valid(reward), logp=LOGP)
    for i, reward in enumerate(rewards)
  ]


@pytest.fixture(scope="module")
def learner():
  return Learner(CONFIG)


@pytest.fixture(scope="module")
def state(learner):
  return learner.reinforcing(learner.fresh())


def blamed(learner, state, trajectories, experts=()):
  with pytest.raises(NonFinite) as error:
    learner.reinforce(state, trajectories, experts, 0)
  return error.value


@pytest.mark.parametrize(("bad", "row"), [(0, [0, 1]), (3, [2, 3]), (5, [4, 5])])
def test_a_reward_that_overflows_is_blamed_alone(learner, state, bad, row):
  """3e38 is a number and so are the returns and the loss; the gradient's norm is not."""
  found = blamed(learner, state, episodes([3e38 if i == bad else 1.0 for i in range(6)]))
  assert "grad_norm" in found.names and found.update == 0
  assert [t.id for t in found.trajectories] == [f"t#{i}" for i in row]
  assert found.rows == (row[0] // 2,)


def test_experts_are_blamed_by_their_rows():
  sound, experts = episodes([1.0] * 4), episodes([1.0] * 2, length=80)
  packed = {"row_length": 160, "max_chunks": 32, "rows_multiple": 2, "pad": 256}
  batch = pack(sound, CONFIG.ipa, 0, experts=experts, **packed)
  for rows, want in (([0, 1], [*sound[:2], *experts]), ([3], [*sound, *experts])):  # 3 is padding
    with pytest.raises(NonFinite) as error, nonfinite.blaming(batch, [*sound, *experts]):
      raise NonFinite(0, ["loss"], rows)
    assert [id(t) for t in error.value.trajectories] == [id(t) for t in want]


def test_weights_of_nan_blame_everything(learner, state):
  sick = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
  found = blamed(learner, sick, episodes([1.0] * 6))
  assert len(found.trajectories) == 6
  assert int(sick.step) == 0 and isinstance(found, FloatingPointError)


def test_what_is_written(learner, state, tmp_path):
  trajectories = episodes([1.0, 1.0, 3e38, 1.0, 1.0, 1.0])
  found = blamed(learner, state, trajectories)
  told = nonfinite.dump(found, tmp_path, "rl")
  folder = tmp_path / "nonfinite" / "step_0"
  for part in ("update 0: ", "grad_norm", "not applied", f"trajectories t#2, t#3 are in {folder}"):
    assert part in str(told)
  written = json.loads((folder / "episodes.json").read_text())
  assert (
    written["update"] == 0 and written["phase"] == "rl" and "grad_norm" in written["not_finite"]
  )
  assert [(e["index"], e["id"]) for e in written["episodes"]] == [(0, "t#2"), (1, "t#3")]
  assert written["episodes"][0]["reward"] == 3e38 and written["episodes"][0]["turns"] == []
  arrays = np.load(folder / "trajectories.npz")
  for n, trajectory in enumerate(trajectories[2:4]):
    for name in ("tokens", "call_ids", "logps", "versions", "chunk_rewards"):
      np.testing.assert_array_equal(arrays[f"{name}_{n}"], getattr(trajectory, name))
    assert arrays[f"row_starts_{n}"].tolist() == [0]
  assert len(arrays.files) == 12


def test_a_place_that_cannot_be_written_hides_nothing(learner, state, tmp_path):
  found = blamed(learner, state, episodes([3e38] + [1.0] * 5))
  (tmp_path / "nonfinite").write_text("in the way")
  told = nonfinite.dump(found, tmp_path, "rl")
  assert "grad_norm" in str(told) and "t#0, t#1 could not be written to" in str(told)


def test_finite_updates_are_as_before(learner, state):
  after, learned, _ = learner.reinforce(state, episodes([1.0] * 6), (), 0)
  assert int(after.step) == 1 and all(map(np.isfinite, learned.values()))


@pytest.mark.slow
def test_a_run_with_an_absurd_rate_ends_with_a_dump(environment, tmp_path):
  """Its weights overflow after an update; nothing that was saved is lost."""
  workdir = tmp_path / "run"
  flags = ["--config.sft.learning_rate=1e36", "--config.sft.checkpoint_every=1"]
  done = loop.run(environment, workdir, *flags, "--config.sft.warmup=0")
  assert done.returncode == 1 and "Traceback" not in done.stderr
  (folder,) = (workdir / "nonfinite").iterdir()
  update = int(folder.name.removeprefix("step_"))
  last = done.stderr.splitlines()[-1]
  assert last.startswith(f"error: update {update}: ") and str(folder) in last and "#demo" in last
  written = json.loads((folder / "episodes.json").read_text())
  assert written["phase"] == "sft" and len(written["episodes"]) == 4
  assert written["episodes"][0]["turns"][0]["action"]
  assert len(loop.rows_of(workdir, "sft")) == update >= 1
  newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
  assert newest == 2 * update
