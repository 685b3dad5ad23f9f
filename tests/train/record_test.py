"""Records come back whole, are bounded, and are refused where they are damaged or foreign."""

import dataclasses
import json
import resource

import numpy as np
import pytest

from rome import files, rollout
from rome.ipa import IPAConfig
from rome.train import record
from rome.train.config import RLConfig, RunConfig
from rome.trajectory import Turn, Valid
from tests.trajectories import make

CONFIG = RunConfig(model="micro")
STATS = rollout.RolloutStats(
  generate_seconds=1.5, env_steps=7, instances=3, finished=2, succeeded=1, filtered=1
)
ROW = {"loss": 0.1, "grad_norm": np.float32(0.1), "chunks": 3, "name": "x", "missing": None}


def batch():
  turns = (Turn("a", "b", 0), Turn("c", "d", None), Turn("", "", -7))
  first = make(
    "count/1#0.1", [(3, 2), (1, 4), (2, 1)], Valid(0.25), logp=-1e-8, task="count/1", new_rows=[2]
  )
  return [
    dataclasses.replace(first, turns=turns, end_reason="context_full"),
    make("move/9#12", [(5, 1)], Valid(1.0), task="move/9"),
  ]


def experts():
  return [make("expert/3", [(2, 2)], Valid(1.0)), make("expert/0", [(2, 3)], Valid(1.0))]


@pytest.fixture
def updates(tmp_path):
  made = record.Updates(tmp_path, CONFIG)
  for step in (1, 2, 3):
    made.write(step, batch(), STATS, experts(), ROW)
  return made


def same(a, b):
  for name in ("tokens", "call_ids", "logps", "versions", "chunk_rewards"):
    x, y = getattr(a, name), getattr(b, name)
    assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), name
  for name in ("id", "task_id", "family", "reward", "end_reason", "row_starts"):
    assert getattr(a, name) == getattr(b, name)
  assert [t.exit_code for t in a.turns] == [t.exit_code for t in b.turns]


def test_an_update_comes_back_whole(updates):
  read = updates.read(2)
  for a, b in zip(read.trajectories, batch(), strict=True):
    same(a, b)
  assert read.stats == STATS
  assert read.row == {"loss": 0.1, "grad_norm": float(np.float32(0.1)), "chunks": 3, "name": "x"}
  assert read.experts == record.fingerprint(experts()) and read.experts[0][0] == "expert/3"
  assert read.origin["engine"] == "native" and read.origin["device"] == "cpu cpu"
  assert {p.name for p in updates.directory.iterdir()} == {f"00000{k}.npz" for k in (1, 2, 3)}


def test_failed_episodes_are_counted(updates):
  lost = dataclasses.replace(STATS, invalid=(batch()[0],) * 2)
  updates.write(4, batch(), lost, [], ROW)
  assert len(updates.read(4).stats.invalid) == 2


def test_demonstrations_and_an_empty_batch_come_back(updates):
  demos = [make("count/1#demo", [(3, 2)], Valid(1.0), logp=np.nan)]
  updates.write_demonstrations(demos)
  same(updates.read_demonstrations()[0], demos[0])
  updates.write(4, [], STATS, [], ROW)
  assert updates.read(4).trajectories == [] and updates.steps() == [1, 2, 3, 4]


def test_fingerprints_tell_experts_apart():
  prints = [record.fingerprint(e) for e in (experts(), experts()[::-1], experts()[:1], [])]
  assert len({json.dumps(p) for p in prints}) == 4
  other = dataclasses.replace(experts()[0], tokens=experts()[0].tokens + 1)
  assert record.fingerprint([other]) != record.fingerprint(experts()[:1])
  one = make("t", [(2, 2), (1, 1)], Valid(1.0))
  two = dataclasses.replace(one, row_starts=(0, 4))
  assert record.fingerprint([one]) != record.fingerprint([two])


def test_a_record_is_written_anew_and_later_ones_are_forgotten(updates):
  updates.write(2, batch()[:1], STATS, [], ROW)
  assert len(updates.read(2).trajectories) == 1
  updates.forget_after(2)
  assert updates.steps() == [1, 2]
  updates.forget_after(0)
  assert updates.steps() == []


def test_records_beyond_the_room_go_up_to_what_a_checkpoint_needs(updates):
  room = sum(updates.path(k).stat().st_size for k in (1, 2, 3))
  updates.prune(needed=3, room=room)
  assert updates.steps() == [1, 2, 3]
  updates.prune(needed=-3, room=room - 1)
  assert updates.steps() == [1, 2, 3]
  updates.prune(needed=3, room=room - 1)
  assert updates.steps() == [3]


@pytest.mark.parametrize("part", range(6))
def test_any_damage_is_found(updates, part):
  """A bit of each member of the archive in turn, or half of the file."""
  path = updates.path(2)
  data = bytearray(path.read_bytes())
  if part == 5:
    del data[len(data) // 2 :]
  else:
    # Behind the local header of a member lies its data.
    starts = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x03\x04"]
    data[starts[part] + 80] ^= 4
  path.write_bytes(data)
  with pytest.raises(record.RecordError, match=r"000002\.npz is damaged; train with the same"):
    updates.read(2)
  assert updates.read(3).row["loss"] == 0.1


def test_an_array_that_was_changed_is_found(updates):
  path = updates.path(2)
  with np.load(path) as loaded:
    arrays = {name: loaded[name] for name in loaded.files}
  arrays["logps"][4] += 1
  np.savez_compressed(path, **arrays)
  with pytest.raises(record.RecordError, match="is damaged"):
    updates.read(2)


def test_pickles_are_not_read(updates):
  np.savez(updates.path(2), header=np.array([{}], object), sha256=np.zeros(32, np.uint8))
  with pytest.raises(record.RecordError, match="is damaged"):
    updates.read(2)


def test_what_is_not_there_or_has_another_name(updates):
  with pytest.raises(record.RecordError, match=r"there is no .*000009\.npz; train with the same"):
    updates.read(9)
  updates.path(1).rename(updates.path(9))
  with pytest.raises(record.RecordError, match="of another step; give it back its name"):
    updates.read(9)


@pytest.mark.parametrize(
  ("name", "value", "words"),
  [
    ("settings", "0", "other settings than those of config.json beside it; put the config.json"),
    ("device", "gpu NVIDIA", "recorded on gpu NVIDIA, and this is cpu cpu.*same kind of device"),
    ("engine", "xla", "backend xla, which here is native; install"),
  ],
)
def test_other_origins_are_refused(updates, name, value, words):
  updates._origin |= {name: value}
  updates.write(2, batch(), STATS, experts(), ROW)
  with pytest.raises(record.RecordError, match=words):
    record.Updates(updates.directory.parent, CONFIG).read(2)


def test_a_record_of_an_earlier_rome_is_refused(updates, monkeypatch):
  with monkeypatch.context() as earlier:
    earlier.setattr(record, "FORMAT", 2)
    updates.write(1, batch(), STATS, [], ROW)
  with pytest.raises(record.RecordError, match=r"format 2, this rome reads 3; .*run\.json has its"):
    updates.read(1)


def test_settings_but_not_alarms_are_part_of_the_origin():
  base = record.origin(CONFIG)
  others = [
    dataclasses.replace(CONFIG, seed=1),
    dataclasses.replace(CONFIG, ipa=IPAConfig(lambda_il=1.0, failure_reward=-1.0)),
    dataclasses.replace(CONFIG, rl=RLConfig(steps=1, batch=2, learning_rate=0.1)),
  ]
  assert len({record.origin(c)["settings"] for c in [CONFIG, *others]}) == 4
  rules = dataclasses.replace(
    CONFIG.alarms, grad_norm=dataclasses.replace(CONFIG.alarms.grad_norm, warn=1e9)
  )
  assert record.origin(dataclasses.replace(CONFIG, alarms=rules)) == base


def test_checkpoints_count_updates():
  assert record.update_of(2 * CONFIG.sft.steps, CONFIG) == 0
  assert record.update_of(2 * CONFIG.sft.steps + 9, CONFIG) == 4
  assert record.update_of(2, CONFIG) < 0


def test_a_full_disk_leaves_what_was_there(updates):
  """A limit on the size of files fails the same writes."""
  before = updates.path(2).read_bytes()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
  try:
    with pytest.raises(files.WriteError, match="000002.npz could not be written .*free space"):
      updates.write(2, batch()[:1], STATS, [], ROW)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert updates.path(2).read_bytes() == before
