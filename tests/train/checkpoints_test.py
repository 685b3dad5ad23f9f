"""Checkpoints come back bit for bit; a bad one is refused or passed over, the others stay."""

import dataclasses
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from rome import models, rollout
from rome.train import state as state_lib
from rome.train.checkpoints import CheckpointError, Checkpoints, tree_sha256
from rome.train.config import StageConfig
from rome.trajectory import Valid
from tests.trajectories import make

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = models.PRESETS["micro"]
OPTIMIZER = state_lib.make_optimizer(StageConfig(steps=1, batch=1, learning_rate=1e-3))
CURSOR = {"phase": "rl", "wall": 1.25, "evals": {"before": {"n": 4, "interval": [0.1, 0.9]}}}


@pytest.fixture(scope="module")
def state():
  return state_lib.init_state(CONFIG, OPTIMIZER, 7)


def shifted(state, by):
  """Another state of the same shape."""
  return state.replace(params=jax.tree.map(lambda x: x + by, state.params), step=state.step + by)


def same(a, b):
  """Whether two states agree in every bit, the key and its type included."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  assert a.key.dtype == b.key.dtype and a.step.dtype == b.step.dtype
  bits = [(s.replace(key=jax.random.key_data(s.key))) for s in (a, b)]
  return tree_sha256(bits[0]) == tree_sha256(bits[1])


def store_of(count):
  """An expert store that has seen `count` successes."""
  store = rollout.ExpertStore(3, 8)
  store.add([make(f"t#{i}", [(2, 3)], Valid(1.0)) for i in range(count)])
  return store.arrays()


STORE = store_of(0)


def saved(tmp_path, state, steps=(1, 2, 3), keep=3):
  checkpoints = Checkpoints(tmp_path, keep)
  for step in steps:
    save(checkpoints, step, shifted(state, step), store_of(step), CURSOR | {"number": step})
  return checkpoints


def save(checkpoints, *args):
  checkpoints.save(*args)
  checkpoints.wait()


def test_there_is_none_at_first(tmp_path, state):
  checkpoints = Checkpoints(tmp_path / "nowhere", 2)
  assert checkpoints.steps() == [] and checkpoints.restore(state, STORE) is None


@pytest.mark.slow
def test_the_newest_comes_back_whole(tmp_path, state):
  checkpoints = saved(tmp_path, state, steps=(2, 10, 9))
  assert checkpoints.steps() == [2, 9, 10]
  restored, store, cursor = checkpoints.restore(state, STORE)
  assert same(restored, shifted(state, 10)) and not same(restored, state)
  assert tree_sha256(store) == tree_sha256(store_of(10)) != tree_sha256(STORE)
  assert cursor == CURSOR | {"number": 10}
  # The key draws what it drew before, and the optimiser can go on.
  assert jax.random.bits(restored.key) == jax.random.bits(state.key)
  grads = jax.tree.map(np.ones_like, state.params)
  jax.jit(OPTIMIZER.update)(grads, restored.opt_state, restored.params)


def test_only_the_newest_stay(tmp_path, state):
  checkpoints = saved(tmp_path, state, steps=(1, 2, 3, 4), keep=2)
  assert checkpoints.steps() == [3, 4]
  assert sorted(p.name for p in checkpoints.directory.iterdir()) == ["3", "4"]


def test_a_step_can_be_saved_again(tmp_path, state):
  checkpoints = saved(tmp_path, state, steps=(1, 1))
  save(checkpoints, 1, shifted(state, 5), STORE, CURSOR)
  assert same(checkpoints.restore(state, STORE)[0], shifted(state, 5))


def test_what_is_saved_may_change_at_once(tmp_path, state):
  """Arrays are donated and overwritten, and the cursor goes on, while the thread writes."""
  checkpoints = Checkpoints(tmp_path, 3)
  given, store = shifted(state_lib.init_state(CONFIG, OPTIMIZER, 7), 1), store_of(2)
  cursor = {"sums": {"wall": 1.0}}
  checkpoints.save(1, given, store, cursor)
  jax.tree.map(lambda x: x.delete(), given)
  for array in store.values():
    array[...] = 7
  cursor["sums"]["wall"] = 2.0
  checkpoints.wait()
  restored, found, told = checkpoints.restore(state, STORE)
  assert same(restored, shifted(state, 1)) and told == {"sums": {"wall": 1.0}}
  assert tree_sha256(found) == tree_sha256(store_of(2))


def test_older_ones_stay_until_the_new_one_is_whole(tmp_path, state):
  """At every moment of a save there is a whole one, with `keep` 1 as well."""
  checkpoints = saved(tmp_path, state, steps=(1,), keep=1)
  checkpoints.save(2, shifted(state, 2), STORE, CURSOR)
  while 2 not in checkpoints.steps():
    assert 1 in checkpoints.steps()
    checkpoints.check()
  assert same(checkpoints.restore(state, STORE, 2)[0], shifted(state, 2))
  checkpoints.close()
  assert [p.name for p in checkpoints.directory.iterdir()] == ["2"]


def files_of(path):
  return sorted(p for p in path.rglob("*") if p.is_file())


def damage_flip(path):
  """Flips a bit in the largest file: the arrays."""
  file = max(files_of(path), key=lambda p: p.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def damage_cut(path):
  file = max(files_of(path), key=lambda p: p.stat().st_size)
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_metadata(path):
  for file in files_of(path):
    if file.suffix in ("", ".json") and "metadata" in file.name.lower():
      file.write_text("{")


def damage_remove(path):
  for file in files_of(path):
    file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_metadata, damage_remove])
def test_a_damaged_one_is_refused_and_the_earlier_ones_are_intact(tmp_path, state, damage):
  checkpoints = saved(tmp_path, state, steps=(1, 2))
  newest = checkpoints.path(2)
  earlier = [(p, p.read_bytes()) for p in files_of(checkpoints.path(1))]
  damage(newest)
  message = f"checkpoint {newest} is damaged .*; delete {newest} to resume from step 1"
  with pytest.raises(CheckpointError, match=message) as error:
    checkpoints.restore(state, STORE)
  assert "\n" not in str(error.value)
  assert [(p, p.read_bytes()) for p in files_of(checkpoints.path(1))] == earlier
  # The mend that the message names does mend.
  subprocess.run(["rm", "-r", str(newest)], check=True)
  assert same(checkpoints.restore(state, STORE)[0], shifted(state, 1))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_metadata, damage_remove])
def test_a_run_goes_on_from_the_newest_good_one(tmp_path, state, damage):
  checkpoints = saved(tmp_path, state, steps=(1, 2, 3))
  kept = {}
  for step in (2, 3):
    damage(checkpoints.path(step))
    kept[step] = [p.read_bytes() for p in files_of(checkpoints.path(step))]
  (checkpoints.directory / "4.orbax-checkpoint-tmp").mkdir()
  told = []
  restored, store, cursor = checkpoints.resume(state, STORE, told.append)
  assert same(restored, shifted(state, 1)) and cursor["number"] == 1
  assert tree_sha256(store) == tree_sha256(store_of(1))
  assert checkpoints.steps() == [1] and len(told) == 2
  for step, line in zip((3, 2), told, strict=True):
    aside = checkpoints.directory / f"{step}.damaged"
    assert line.startswith(f"checkpoint {checkpoints.path(step)} is damaged (") and "\n" not in line
    assert line.endswith(f"now {aside}; what was done after checkpoint 1 is done again")
    assert [p.read_bytes() for p in files_of(aside)] == kept[step]
  # What was set aside is in the way of nothing, and a second time has a name of its own.
  save(checkpoints, 2, shifted(state, 2), STORE, CURSOR)
  damage(checkpoints.path(2))
  checkpoints.resume(state, STORE, told.append)
  assert {p.name for p in checkpoints.directory.iterdir()} == {
    *("1", "2.damaged", "2.damaged1", "3.damaged"),
  }


def test_where_none_is_good_nothing_is_touched(tmp_path, state):
  checkpoints = saved(tmp_path, state, steps=(1, 2))
  for step in (1, 2):
    damage_cut(checkpoints.path(step))
  message = f"/2 is damaged .*so are all before it; delete {checkpoints.directory} to start afresh"
  with pytest.raises(CheckpointError, match=message):
    checkpoints.resume(state, STORE, pytest.fail)
  assert checkpoints.steps() == [1, 2]
  assert Checkpoints(tmp_path / "none", 1).resume(state, STORE, pytest.fail) is None


def test_another_model_behind_a_damaged_one_is_refused_too(tmp_path, state):
  checkpoints = saved(tmp_path, state, steps=(1, 2))
  damage_cut(checkpoints.path(2))
  with pytest.raises(CheckpointError, match=r"/1 is of another experts\.capacity"):
    checkpoints.resume(state, rollout.ExpertStore(4, 8).arrays(), pytest.fail)
  assert checkpoints.steps() == [1, 2]


def test_a_damaged_only_one_says_start_afresh(tmp_path, state):
  checkpoints = saved(tmp_path, state, steps=(4,))
  damage_cut(checkpoints.path(4))
  with pytest.raises(CheckpointError, match=f"delete {checkpoints.path(4)} to start afresh"):
    checkpoints.restore(state, STORE)


@pytest.mark.slow
def test_another_model_is_refused(tmp_path, state):
  checkpoints = saved(tmp_path, state, steps=(1,))
  other = state_lib.init_state(dataclasses.replace(CONFIG, num_hidden_layers=1), OPTIMIZER, 7)
  with pytest.raises(CheckpointError, match="is of another model or optimiser than this config"):
    checkpoints.restore(other, STORE)
  larger = {name: np.zeros((len(x) + 1, *x.shape[1:]), x.dtype) for name, x in STORE.items()}
  with pytest.raises(CheckpointError, match=r"is of another experts\.capacity, agent\.context or"):
    checkpoints.restore(state, larger)
  with pytest.raises(CheckpointError, match=r"resampling\.mode or an earlier rome \(run\.json has"):
    checkpoints.restore(state, STORE | {"more": np.zeros(3)})
  assert checkpoints.steps() == [1]


def test_what_a_killed_save_leaves_is_ignored(tmp_path, state):
  checkpoints = saved(tmp_path, state, steps=(1,))
  for name in ("2.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-17", ".2.tmp"):
    (checkpoints.directory / name).mkdir()
    (checkpoints.directory / name / "part").write_text("x")
  assert checkpoints.steps() == [1]
  assert same(checkpoints.restore(state, STORE)[0], shifted(state, 1))
  save(checkpoints, 2, shifted(state, 2), STORE, CURSOR)
  assert same(checkpoints.restore(state, STORE)[0], shifted(state, 2))


def test_a_directory_that_cannot_be_written(tmp_path, state):
  (tmp_path / "checkpoints").write_text("a file is in the way")
  with pytest.raises(CheckpointError, match="could not be written .*another --workdir") as error:
    save(Checkpoints(tmp_path, 2), 1, state, STORE, CURSOR)
  assert "\n" not in str(error.value)


def test_a_full_disk_leaves_the_earlier_ones(tmp_path, state):
  """Stood in for by a limit on the size of files, which fails the same writes."""
  checkpoints = saved(tmp_path, state, steps=(1,))
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
  try:
    checkpoints.save(2, shifted(state, 2), STORE, CURSOR)
    with pytest.raises(CheckpointError, match="/2 could not be written .*free disk space in"):
      while True:  # as a run finds it between two saves
        checkpoints.check()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert [p.name for p in checkpoints.directory.iterdir()] == ["1"]
  assert same(checkpoints.restore(state, STORE)[0], shifted(state, 1))
  save(checkpoints, 2, shifted(state, 2), STORE, CURSOR)
  assert same(checkpoints.restore(state, STORE)[0], shifted(state, 2))


_FULL = """
import pathlib, sys
from rome.train.checkpoints import CheckpointError
from tests.train.checkpoints_test import *
state = state_lib.init_state(CONFIG, OPTIMIZER, 7)
checkpoints = saved(pathlib.Path(sys.argv[1]), state, steps=(1,))
ballast = checkpoints.directory / "ballast"
with open(ballast, "wb", buffering=0) as file:
  try:
    while file.write(bytes(4096)):
      pass
  except OSError:
    pass
try:
  save(checkpoints, 2, shifted(state, 2), STORE, CURSOR)
except CheckpointError as error:
  print(error)
ballast.unlink()
assert [p.name for p in checkpoints.directory.iterdir()] == ["1"]
assert same(checkpoints.resume(state, STORE, print)[0], shifted(state, 1))
save(checkpoints, 2, shifted(state, 2), STORE, CURSOR)
assert same(checkpoints.resume(state, STORE, print)[0], shifted(state, 2))
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
  """A filesystem of 4 MB in a mount namespace of its own."""
  mount = 'mount -t tmpfs -o size=4m tmpfs "$1" && exec "$2" -c "$3" "$1"'
  done = subprocess.run(
    ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, _FULL],
    cwd=ROOT, capture_output=True, text=True, timeout=120,
  )  # fmt: skip
  directory = tmp_path / "checkpoints"
  assert done.returncode == 0, done.stderr
  assert done.stdout == (
    f"checkpoint {directory}/2 could not be written ([Errno 28] No space left on device); free "
    f"disk space in {directory} or choose another --workdir. Earlier checkpoints are intact\n"
  )
  assert "Traceback" not in done.stderr


def test_the_hash_sees_every_bit_name_shape_and_type():
  base = {"a": np.zeros((2, 3), np.float32), "b": np.ones(2, np.int32)}
  negative = {**base, "a": -base["a"]}  # -0.0: equal, and other bits
  variants = [
    base,
    negative,
    {**base, "a": base["a"].reshape(3, 2)},
    {**base, "a": base["a"].view(np.int32)},
    {"c": base["a"], "b": base["b"]},
  ]
  assert len({tree_sha256(v) for v in variants}) == len(variants)
  assert tree_sha256(base) == tree_sha256({"b": base["b"].copy(), "a": jax.numpy.zeros((2, 3))})


_SAVER = """
import sys, jax
from rome import models, rollout
from rome.train import state as state_lib
from rome.train.checkpoints import Checkpoints
from rome.train.config import StageConfig
optimizer = state_lib.make_optimizer(StageConfig(steps=1, batch=1, learning_rate=1e-3))
state = state_lib.init_state(models.PRESETS["micro"], optimizer, 7)
checkpoints = Checkpoints(sys.argv[1], 2)
store = rollout.ExpertStore(3, 8).arrays()
for step in range(1, 1000):
  checkpoints.save(step, state.replace(step=state.step + step), store, {"number": step})
  if step == 3:
    checkpoints.wait()
  print(step, flush=True)
"""


@pytest.mark.slow
def test_a_save_that_is_killed_for_real(tmp_path, state):
  command = [sys.executable, "-c", _SAVER, str(tmp_path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
    for line in process.stdout:
      if int(line) == 3:
        break
    time.sleep(random.SystemRandom().random() * 0.1)
    process.send_signal(signal.SIGKILL)
  checkpoints = Checkpoints(tmp_path, 2)
  restored, _, cursor = checkpoints.restore(state, STORE)
  newest = checkpoints.steps()[-1]
  assert newest >= 3 and cursor == {"number": newest} and int(restored.step) == newest
