"""Where runs begin: weights from runs, checkpoints and model directories, and what does not fit."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from rome import models
from rome.rollout import ExpertStore, TasksConfig
from rome.train import start
from rome.train.checkpoints import CheckpointError, Checkpoints
from rome.train.config import ConfigError, RLConfig, RunConfig, to_config_dict
from rome.train.learner import Learner

pytestmark = pytest.mark.slow

MICRO = models.PRESETS["micro"]
CONFIG = RunConfig(model="micro")
init = jax.jit(models.init_params, static_argnums=0)


def equal(a, b):
  return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


def begin_from(path, **changes) -> RunConfig:
  return dataclasses.replace(CONFIG, init_from=str(path), **changes)


@pytest.fixture(scope="module")
def other():
  """Weights that no run with seed 0 begins with."""
  return init(MICRO, jax.random.key(99))


@pytest.fixture(scope="module")
def directory(other, tmp_path_factory):
  path = tmp_path_factory.mktemp("model")
  models.save(path, MICRO, other)
  return path


@pytest.fixture(scope="module")
def workdir(other, tmp_path_factory):
  """The work directory of a run with two checkpoints, the newer of which holds `other`."""
  path = tmp_path_factory.mktemp("run")
  (path / "config.json").write_text(json.dumps(to_config_dict(CONFIG).to_dict()))
  fresh, store = Learner(CONFIG).fresh(), ExpertStore(8, 16).arrays()
  saved = Checkpoints(path, 2)
  saved.save(2, fresh, store, {"phase": "sft"})
  saved.save(4, dataclasses.replace(fresh, params=other), store, {"phase": "rl"})
  saved.close()
  return path


def test_without_it_weights_are_random(other):
  state = Learner(CONFIG).begin()
  assert equal(state.params, Learner(CONFIG).fresh().params) and not equal(state.params, other)


@pytest.mark.parametrize("model", ["micro", "auto"])
def test_from_a_model_directory(directory, other, model):
  learner = Learner(begin_from(directory, model=model))
  state = learner.begin()
  assert learner.model == MICRO and equal(state.params, other)
  # The rest is as in any run: the key of the seed, moments of zero, update 0.
  fresh = Learner(CONFIG).fresh()
  assert int(state.step) == 0 and equal(state.opt_state, fresh.opt_state)
  assert equal(jax.random.key_data(state.key), jax.random.key_data(fresh.key))


@pytest.mark.parametrize("model", ["micro", "auto"])
def test_from_a_run_and_from_one_of_its_checkpoints(workdir, other, model):
  assert equal(Learner(begin_from(workdir, model=model)).begin().params, other)
  assert equal(Learner(begin_from(workdir / "checkpoints/4", model=model)).begin().params, other)
  first = Learner(begin_from(workdir / "checkpoints/2", model=model)).begin()
  assert equal(first.params, Learner(CONFIG).fresh().params)


def test_from_a_run_that_began_from_a_directory(directory, other, tmp_path):
  config = begin_from(directory, model="auto")
  (tmp_path / "config.json").write_text(json.dumps(to_config_dict(config).to_dict()))
  saved = Checkpoints(tmp_path, 1)
  saved.save(0, Learner(config).begin(), ExpertStore(8, 16).arrays(), {})
  saved.close()
  learner = Learner(begin_from(tmp_path, model="auto"))
  assert learner.model == MICRO and equal(learner.begin().params, other)


def test_a_damaged_checkpoint(workdir, tmp_path):
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  for file in (copy / "checkpoints/4").rglob("*"):
    if file.is_file() and file.stat().st_size > 1000:
      file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(CheckpointError, match="checkpoint .*/4 is damaged"):
    start.load_params(begin_from(copy))


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda p: None, "cannot be read .*config.json.*give a run's workdir"),
    (lambda p: (p / "checkpoints").mkdir(), "cannot be read .it has no finished checkpoint"),
    (lambda p: (p / "config.json").write_text("{}"), "cannot be read .*model_type must be one of"),
    (lambda p: (p / "checkpoints/8").mkdir(parents=True), "config.json cannot be read"),
  ],
)
def test_a_place_without_weights(tmp_path, make, message):
  make(tmp_path)
  with pytest.raises(ConfigError, match=message) as error:
    start.check(begin_from(tmp_path, model="auto"))
  assert "\n" not in str(error.value)


def test_a_preset_has_to_agree(directory):
  config = begin_from(directory, model="tiny")
  words = "config.model=tiny has hidden_size=128, and config.init_from=.* has 16; set .*model=auto"
  with pytest.raises(ConfigError, match=words):
    start.check(config)
  start.check(config, fresh=False)  # a run that goes on does not need it


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"model": "smollm2_135m"},
      "config.model=smollm2_135m has a vocabulary of 49152, .* the 264 ids of the byte tokenizer",
    ),
    ({"estimator": "no.such:loss"}, "config.estimator='no.such:loss' cannot be imported"),
    ({"estimator": "math:isclose"}, "config.estimator='math:isclose' does not take what it"),
    (
      {"estimator": "tests.train.start_test:loss_of_a_row"},
      "must return a scalar loss and a dict of scalar metrics; .'loss'. is not",
    ),
    (
      {"estimator": "tests.train.start_test:no_metrics"},
      "fails on a batch of this run .*must return a scalar loss and a dict",
    ),
    (
      {
        "estimator": "tests.train.start_test:silent",
        "numerics": "exact",
        "rl": RLConfig(steps=1, batch=64, learning_rate=1e-3, micro_rows=32),
        "row_length": 160,
      },
      "must give the metric mismatch_max with numerics='exact'",
    ),
    ({"reward": "math:tau"}, "config.reward='math:tau' is float, which cannot be called"),
    ({"tasks": TasksConfig(env="math:hypotenuse")}, "config.tasks.env='math:hypotenuse' cannot be"),
    (
      {"tasks": TasksConfig(train_dir="/nowhere", held_out_dir="/nowhere")},
      "no task directories in /nowhere",
    ),
  ],
)
def test_what_cannot_work_is_one_line_at_the_start(changes, message):
  with pytest.raises(ValueError, match=message) as error:
    start.check(dataclasses.replace(CONFIG, **changes))
  assert "\n" not in str(error.value)


def test_an_own_estimator_that_works():
  start.check(dataclasses.replace(CONFIG, estimator="tests.train.start_test:silent"))
  assert start.estimator_of(dataclasses.replace(CONFIG, estimator="tis")).__name__ == "tis"


def loss_of_a_row(logp_BxT, batch, config, totals, entropy_BxT):
  return logp_BxT[0], {}


def no_metrics(logp_BxT, batch, config, totals, entropy_BxT):
  return logp_BxT.sum()


def silent(logp_BxT, batch, config, totals, entropy_BxT):
  return logp_BxT.sum(), {}


def test_router_losses_need_experts_in_a_model_of_auto_sizes(tmp_path):
  dense = dataclasses.replace(
    MICRO, num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, intermediate_size=16
  )
  models.save(tmp_path, dense, init(dense, jax.random.key(0)))
  config = begin_from(tmp_path, model="auto", router_z_weight=1e-3)
  with pytest.raises(ConfigError, match="must be 0 for init_from=.*, which has no experts"):
    start.check(config)
