"""Resampling in a run: where members start, what is imitated, which experts stay."""

import dataclasses

import jax
import numpy as np
import pytest

from rome.rollout.groups import Member
from rome.rollout.resampling import Resampler, ResamplingConfig
from rome.trajectory import Valid
from tests.trajectories import make

CONTEXT, MAX_CHUNKS, ROOM = 40, 8, 4
TASKS = ["a", "b", "c"]
KEY = jax.random.key(3)


def resampler(mode="rollback", **settings):
  config = ResamplingConfig(mode=mode, **settings)
  return Resampler(config, TASKS, CONTEXT, MAX_CHUNKS, ROOM, KEY)


def teach(task, chunks=4):
  """A demonstration of (context 3, reply 2) a chunk."""
  demo = make(f"{task}#demo", [(3, 2)] * chunks, Valid(1.0), task=task)
  return dataclasses.replace(demo, logps=np.where(demo.call_ids >= 0, np.nan, 0))


def play(store, instance, success, sample=0, more=1, version=5):
  """An episode from where the store says, with `more` chunks of its own."""
  start = store.start(Member(instance, sample))
  prefix = start.context if start else [1, 2, 3]
  name = TASKS[instance % 3]
  t = make(f"{name}#{instance}.{sample}", [(0, 2), *[(3, 2)] * (more - 1)], Valid(float(success)))
  tokens, ids = [*prefix, *t.tokens.tolist()], [-1] * len(prefix) + t.call_ids.tolist()
  return dataclasses.replace(
    t,
    task_id=name,
    tokens=np.array(tokens, np.int32),
    call_ids=np.array(ids, np.int32),
    logps=np.where(np.array(ids) >= 0, -1.0, 0.0).astype(np.float32),
    versions=np.full(more, version, np.int32),
    start=start.chunks if start else 0,
  )


def at(store, instance=0, sample=0):
  start = store.start(Member(instance, sample))
  return start.chunks if start else 0


def test_rollback_moves_toward_the_initial_state_as_starts_are_mastered():
  store = resampler()
  store.add([teach("a")])
  assert len(store) == 1 and [at(store, n) for n in range(6)] == [3, 0, 0, 3, 0, 0]
  group = [play(store, 0, success, sample) for sample, success in enumerate([1, 1, 0, 0])]
  assert all(t.start == 3 for t in group)
  store.add(group)
  assert at(store) == 3  # half is below 0.8
  for left in (2, 1, 0):
    # A success from the pointer is a new expert with the same chunks before it.
    store.add([play(store, 0, 1, sample, more=4 - at(store)) for sample in range(4)])
    assert at(store) == left
  assert store.row([play(store, 0, 1)])["mastered_share"] == 0.0
  store.add([play(store, 0, 1, sample, more=4) for sample in range(4)])
  assert store.row([play(store, 0, 1)])["mastered_share"] == pytest.approx(1 / 3)
  assert at(store) == 0


def test_anchors_spread_the_members_of_a_group():
  store = resampler("anchors", anchors=3)
  assert [at(store, 0, m) for m in range(4)] == [0, 0, 0, 0]  # no expert yet
  store.add([teach("a", 5)])
  assert [at(store, 0, m) for m in range(6)] == [0, 2, 4, 0, 2, 4]
  drawn = resampler("anchors", anchors=3, anchor_mode="random")
  drawn.add([teach("a", 7)])
  visits = [tuple(at(drawn, 3 * visit, m) for m in range(3)) for visit in range(6)]
  assert len(set(visits)) > 1 and all(v[0] == 0 and len(set(v)) == 3 for v in visits)
  again = resampler("anchors", anchors=3, anchor_mode="random")
  again.add([teach("a", 7)])
  assert visits == [tuple(at(again, 3 * visit, m) for m in range(3)) for visit in range(6)]


def test_a_start_leaves_room_for_a_reply():
  store = resampler()
  store.add([teach("a", 8)])  # 40 tokens; start 7 has 38 in front of it
  assert at(store) == 6 and len(store.start(Member(0, 0)).context) == 33


def test_what_is_imitated_are_the_experts_of_the_batch_as_far_as_it_started():
  store = resampler("anchors", anchors=2)
  store.add([teach("a"), teach("b")])
  batch = [play(store, 0, 0, 1), play(store, 0, 0, 0), play(store, 2, 0)]
  assert [t.start for t in batch] == [3, 0, 0]
  (expert,) = store.imitated(batch, 9)  # c has none, b is not in the batch
  assert expert.task_id == "a" and expert.num_chunks == 4 and expert.success
  assert sorted(set(expert.call_ids.tolist())) == [-1, 0, 1, 2, 3]
  (expert,) = store.imitated(batch[1:], 9)
  assert sorted(set(expert.call_ids.tolist())) == [-1, 0]  # from the initial state: the first alone
  assert np.isnan(expert.logps[expert.call_ids >= 0]).all()
  assert store.imitated([play(store, 2, 1)], 9) == []
  both = [play(store, 0, 0, 1), play(store, 1, 0, 1)]
  assert [t.task_id for t in store.imitated(both, 9)] == ["a", "b"]
  assert [t.task_id for t in store.imitated(both, 1)] == ["a"]


@pytest.mark.parametrize(
  ("mode", "success", "count"),
  [
    ("always", 1, 1),
    ("only_when_no_positive", 1, 0),
    ("only_when_no_positive", 0, 1),
    ("off", 0, 0),
  ],
)
def test_modes_of_imitation(mode, success, count):
  store = resampler("anchors", il_mode=mode)
  store.add([teach("a")])
  assert len(store.imitated([play(store, 0, success)], 9)) == count


def test_the_policys_success_from_a_start_becomes_a_whole_expert():
  store = resampler("anchors", anchors=2)
  store.add([teach("a")])
  before = store.start(Member(0, 1))
  store.add([play(store, 0, 0, 1), won := play(store, 0, 1, 1, more=2)])
  after = store.start(Member(0, 1))
  assert after.expert.num_chunks == 5 and after.chunks == 4
  assert after.expert.tokens.tolist() == won.tokens.tolist()
  shared = len(before.context)
  assert after.expert.call_ids[:shared].tolist() == before.expert.call_ids[:shared].tolist()
  assert after.expert.versions.tolist() == [5] * 5
  # An older version does not replace it, a newer one does; a failure never.
  store.add([play(store, 0, 1, 1, version=4), play(store, 0, 0, 1, version=9)])
  assert store.start(Member(0, 1)).expert.id == after.expert.id
  store.add([play(store, 0, 1, 1, version=6)])
  assert store.start(Member(0, 1)).expert.versions[0] == 6


def test_a_success_behind_the_pointer_does_not_lose_it():
  store = resampler()
  store.add([teach("a")])
  early = play(resampler(), 0, 1, more=4)  # from the initial state
  store.add([early])
  assert at(store) == 3 and store.start(Member(0, 0)).expert.versions[0] == -1


def test_a_success_whose_expert_was_replaced_meanwhile_is_none():
  store = resampler("anchors", anchors=2)
  store.add([teach("a")])
  late = play(store, 0, 1, 1, version=9)
  other = make("a#9", [(4, 3), (2, 2)], Valid(1.0), task="a")
  store.add([other])
  now = store.start(Member(0, 1)).expert.id
  store.add([late])
  assert store.start(Member(0, 1)).expert.id == now


def test_of_an_expert_of_several_rows_the_first_one_counts():
  """Starts lie in it, and the pointer moves; its returns are those of the whole."""
  store = resampler()
  whole = teach("a", 6)
  store.add([dataclasses.replace(whole, row_starts=(0, 20))])  # four chunks, then two
  start = store.start(Member(0, 0))
  assert start.chunks == 3 and start.context == whole.tokens[:18].tolist()
  won = play(store, 0, 1, more=2)
  (expert,) = store.imitated([won], 9)
  assert expert.num_chunks == 6 and expert.call_ids.max() == 3 and len(expert.tokens) == 20
  # The policy's own success goes on in a row of its own, too.
  store.add([dataclasses.replace(won, row_starts=(0, 20))])
  assert at(store) == 2
  start = store.start(Member(0, 0))
  assert start.expert.num_chunks == 5 and start.expert.versions[0] == 5
  assert start.expert.tokens.tolist() == won.tokens[:20].tolist()
  assert start.expert.call_ids.max() == 3


def test_arrays_are_all_of_it():
  store, other = resampler(), resampler()
  store.add([teach("a"), teach("c", 3)])
  store.add([play(store, 0, 1, s) for s in range(4)] + [play(store, 2, 0)])
  other.load(store.arrays())
  for instance in range(3):
    assert at(other, instance) == at(store, instance)
  batch = [play(store, 0, 1, s, more=2) for s in range(4)]
  store.add(batch)
  other.add(batch)
  assert {k: v.tobytes() for k, v in store.arrays().items()} == {
    k: v.tobytes() for k, v in other.arrays().items()
  }


def test_a_row_tells_starts_and_the_worst_task():
  store = resampler("anchors", anchors=2)
  store.add([teach("a")])
  batch = [play(store, 0, 1, 0), play(store, 0, 0, 1), play(store, 1, 0)]
  row = store.row(batch)
  assert row["success_initial"] == 0.5 and row["success_worst"] == 0.0 and row["start"] == 1.0


def test_an_unknown_mode_is_refused():
  with pytest.raises(ValueError, match="resampling.mode must be one of off, rollback, anchors"):
    ResamplingConfig(mode="forward")
