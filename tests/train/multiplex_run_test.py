"""Whole runs whose engines are on several devices, some of them the trainer's in turn."""

import dataclasses
import os

import jax
import pytest

from experiments import runner
from experiments.configs import quickstart
from rome import models
from rome.envs import owner
from rome.rollout import AgentConfig
from rome.train import division, placement, play
from rome.train.config import ConfigError, EngineConfig, MeshConfig, RLConfig, RunConfig
from rome.train.metrics import read_jsonl
from tests.train.loop_test import (
  inner_processes,
  measured,
  owned_by,
  rows_of,
  run,
  start,
  summary,
  wait_until,
)
from tests.train.overlap_test import FLAGS, UPDATES, check_ledger
from tests.train.timeline_test import read

pytestmark = pytest.mark.devices8

# Four devices, as many as engine.slots; most of the time goes into compiling.
XLA_FLAGS = (
  "--xla_force_host_platform_device_count=4",
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
)
FEWER = ("--config.sft.steps=2", "--config.eval.instances=2", "--config.eval.plateau=1")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  return os.environ | {
    "XLA_FLAGS": " ".join(XLA_FLAGS),
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


@pytest.mark.slow
def test_a_synchronous_run_is_the_same_on_one_device_and_on_four(environment, tmp_path):
  """One of the four trains as well."""
  one, four = tmp_path / "one", tmp_path / "four"
  for workdir, flags in ((one, ()), (four, ("--config.engine.devices=4",))):
    done = run(environment, workdir, *FEWER, "--config.rl.steps=3", *flags)
    assert done.returncode == 0, done.stderr
  assert measured(four) == measured(one) and len(rows_of(four, "rl")) == 3
  assert summary(four)["params_sha256"] == summary(one)["params_sha256"]
  assert not any(name == "devices" for name, _ in counters(four))  # none is lent


def counters(workdir):
  return [(e["name"], e["args"]) for e in read(workdir / "timeline.json") if e["ph"] == "C"]


def check_rows(workdir):
  """Never do more requests run than devices that generate have slots, one each; sometimes as many.

  Returns:
    How often devices were lent.
  """
  lent = most = 0
  generating = 4
  for name, values in counters(workdir):
    if name == "devices":
      assert values in ({"generating": 4, "lent": 0}, {"generating": 2, "lent": 2})
      generating = values["generating"]
      lent += values["lent"] > 0
    else:
      assert values["running"] <= generating
      most = max(most, values["running"])
  assert most > 2
  return lent


@pytest.mark.slow
def test_an_asynchronous_run_lends_devices_and_a_kill_loses_and_doubles_nothing(
  environment, tmp_path
):
  flags = (*FLAGS, *FEWER, "--config.engine.devices=-1", "--config.mesh.data=2")
  process = start(environment, tmp_path, *flags)
  label = owner.label(process.pid)
  wait_until(process, lambda: len(rows_of(tmp_path, "rl")) >= 3, "row 3 of rl", timeout=200)
  inner = inner_processes(owned_by(label))
  process.kill()
  process.communicate()
  assert check_rows(tmp_path) >= 2
  again = run(environment, tmp_path, *flags)
  assert again.returncode == 0 and "resuming" in again.stdout, again.stderr
  assert "devices that generate, and train during updates: 2" in again.stdout
  dropped, gaps = check_ledger(tmp_path)
  assert len(gaps) == dropped
  assert [row["step"] for row in rows_of(tmp_path, "rl")] == list(range(1, UPDATES + 1))
  # As often as updates: those that the kill took were made twice, its last one may lack here.
  assert check_rows(tmp_path) >= UPDATES - 1
  last = [values for name, values in counters(tmp_path) if name == "devices"][-1]
  assert last == {"generating": 4, "lent": 0}  # for the evaluation
  assert owned_by(label) == set() and all(owner.is_dead(one) for one in inner)
  assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["name"] == "after"


# --- settings ------------------------------------------------------------------------------------

BASE = RunConfig(model="micro", row_length=160, agent=AgentConfig(context=160))


def config(devices=1, slots=32, data=1, staleness=0):
  rl = RLConfig(steps=4, batch=8, learning_rate=1e-3, max_staleness=staleness)
  engine = EngineConfig(slots=slots, devices=devices)
  return dataclasses.replace(BASE, rl=rl, engine=engine, mesh=MeshConfig(data=data))


def lent(wanted):
  mesh = placement.mesh_of(wanted, models.PRESETS[wanted.model])
  return [device.id for device in division.lent(wanted, mesh)]


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"devices": 0}, "config.engine.devices must be at least 1, or -1 for all, got 0"),
    ({"devices": -2}, "config.engine.devices must be at least 1, or -1 for all, got -2"),
    (
      {"devices": 4, "slots": 6},
      "config.engine.slots must be a multiple of engine.devices=4, which share them, got 6",
    ),
    (
      {"devices": 16},
      "config.engine.devices must be at most the 8 of this process, or -1 for all of them, got 16",
    ),
    (
      {"devices": -1, "slots": 12},
      "config.engine.slots must be a multiple of the 8 devices of engine.devices=-1, which share "
      "them, got 12",
    ),
    (
      {"devices": -1, "data": 8, "staleness": 1},
      "config.engine.devices=-1: training takes all 8 of them during updates, and "
      "rl.max_staleness=1 needs one that goes on generating; make config.mesh smaller",
    ),
    (
      {"devices": 2, "data": 8, "staleness": 2},
      "config.engine.devices=2: training takes all 2 of them",
    ),
  ],
)
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(ConfigError) as error:
    lent(config(**settings))
  assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_memory_is_that_of_a_device_with_its_share_of_the_slots():
  model = models.PRESETS["micro"]
  params = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
  weights, cache = play.make_engines(config(devices=4), model).memory(params)
  assert (weights, cache) == play.make_engine(config(slots=8), model).memory(params)
  assert weights == play.make_engines(config(), model).memory(params)[0]
  assert cache < play.make_engines(config(), model).memory(params)[1] / 3


def test_exact_numerics_have_one_device():
  rl = dataclasses.replace(BASE.rl, micro_rows=32)
  with pytest.raises(ConfigError, match="config.engine.devices must be 1 because of numerics='exa"):
    dataclasses.replace(config(devices=4), numerics="exact", rl=rl)


@pytest.mark.parametrize(
  ("settings", "wanted"),
  [
    ({"staleness": 1}, []),  # one engine beside the trainer, as ever
    ({"devices": 8, "data": 8}, []),  # they take turns, so nothing has to leave
    ({"devices": 4, "data": 4, "staleness": 1}, []),  # a static split
    ({"devices": -1, "staleness": 1}, [0]),
    ({"devices": -1, "data": 4, "staleness": 1}, [0, 1, 2, 3]),
    ({"devices": 6, "slots": 36, "data": 4, "staleness": 1}, [2, 3]),
  ],
)
def test_who_is_lent(settings, wanted):
  assert lent(config(**settings)) == wanted


def test_a_dry_run_tells_it_too(tmp_path, capsys):
  values = quickstart.get_config()
  values.model, values.engine.devices, values.rl.max_staleness = "micro", -1, 1
  values.mesh.data = values.sft.micro_rows = jax.device_count()
  assert runner.train(values, tmp_path / "dry", dry_run=True) == 1
  told = capsys.readouterr().err
  assert told.startswith("error: config.engine.devices=-1: ") and len(told.splitlines()) == 1
  assert not (tmp_path / "dry").exists()
