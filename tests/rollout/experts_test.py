"""The expert store: successes only, the newest, whole, and the same after a checkpoint."""

import numpy as np
import pytest

from rome.rollout import ExpertStore
from rome.trajectory import Invalid, Valid
from tests.trajectories import make


def successes(count, first=0):
  return [make(f"t#{i}", [(2, 1 + i % 3), (1, 2)], Valid(1.0)) for i in range(first, first + count)]


def contents(store):
  drawn = store.sample(np.random.default_rng(0), 99)
  return {int(t.id.removeprefix("expert/")): t for t in drawn}


def test_only_verified_successes_enter():
  store = ExpertStore(5, 16)
  good = make("good", [(2, 3)], Valid(1.0))
  store.add([make("bad", [(2, 3)], Valid(0.0)), good, make("lost", [(2, 3)], Invalid("gone"))])
  assert len(store) == 1
  np.testing.assert_array_equal(contents(store)[0].tokens, good.tokens)


def test_experts_come_back_whole_and_without_logps():
  store, originals = ExpertStore(5, 16), successes(4)
  store.add(originals)
  for place, expert in contents(store).items():
    want = originals[place]
    np.testing.assert_array_equal(expert.tokens, want.tokens)
    np.testing.assert_array_equal(expert.call_ids, want.call_ids)
    sampled = want.call_ids >= 0
    assert np.isnan(expert.logps[sampled]).all() and not expert.logps[~sampled].any()
    assert expert.num_chunks == want.num_chunks and expert.success


def test_the_newest_stay():
  store, originals = ExpertStore(3, 16), successes(8)
  for trajectory in originals:
    store.add([trajectory])
  assert len(store) == 3
  # Number 6 lies at place 0, 7 at place 1, and 5 is still at place 2.
  for place, number in ((0, 6), (1, 7), (2, 5)):
    np.testing.assert_array_equal(contents(store)[place].tokens, originals[number].tokens)


def test_a_place_forgets_a_longer_tenant():
  store = ExpertStore(1, 16)
  store.add([make("long", [(5, 8)], Valid(1.0))])
  short = make("short", [(1, 2)], Valid(1.0))
  store.add([short])
  np.testing.assert_array_equal(contents(store)[0].tokens, short.tokens)
  assert contents(store)[0].num_chunks == 1


def test_a_draw_follows_from_its_generator_and_has_no_repeats():
  store = ExpertStore(20, 16)
  store.add(successes(20))
  draw = [[t.id for t in store.sample(np.random.default_rng(seed), 8)] for seed in (1, 1, 2)]
  assert draw[0] == draw[1] != draw[2] and len(set(draw[0])) == 8
  assert len(store.sample(np.random.default_rng(0), 50)) == 20
  assert ExpertStore(4, 16).sample(np.random.default_rng(0), 3) == []
  assert store.sample(np.random.default_rng(0), 0) == []


def rows(n, first, count=3):
  """A success of several rows of six tokens."""
  return make(
    f"t#{n}", [(2, 1 + first), (1, 2)] * count, Valid(1.0), new_rows=range(2, 2 * count, 2)
  )


def test_an_expert_of_several_rows_comes_back_whole_and_goes_whole():
  store, one, two = ExpertStore(5, 16), rows(0, 1), rows(1, 2, count=2)
  assert len(one.tokens) > 16  # a row is what has to fit
  store.add([one, two])
  assert len(store) == 2
  for place, want in ((0, one), (3, two)):
    expert = contents(store)[place]
    for name in ("tokens", "call_ids"):
      np.testing.assert_array_equal(getattr(expert, name), getattr(want, name))
    assert expert.row_starts == want.row_starts and expert.num_chunks == want.num_chunks
  (single,) = successes(1)
  store.add([single])  # in place of the first row of `one`, whose others go with it
  assert {place: len(t.rows) for place, t in contents(store).items()} == {0: 1, 3: 2}
  store.add([one])  # behind it
  assert {place: len(t.rows) for place, t in contents(store).items()} == {0: 1, 1: 3}
  store.add([two, two])  # around the end
  assert {place: len(t.rows) for place, t in contents(store).items()} == {4: 2, 1: 2}
  np.testing.assert_array_equal(contents(store)[4].tokens, two.tokens)


def test_an_expert_of_more_rows_than_there_is_room_for_is_none():
  store = ExpertStore(2, 16)
  store.add([rows(0, 1)])
  assert len(store) == 0 and store.sample(np.random.default_rng(0), 2) == []


@pytest.mark.parametrize("seen", [0, 2, 7])
def test_a_saved_store_goes_on_as_the_first_would_have(seen):
  store, other = ExpertStore(3, 16), ExpertStore(3, 16)
  store.add(successes(seen))
  other.load({name: array.copy() for name, array in store.arrays().items()})
  for one in (store, other):
    one.add(successes(2, first=seen))
  assert len(store) == len(other) == min(seen + 2, 3)
  for name, array in store.arrays().items():
    np.testing.assert_array_equal(array, other.arrays()[name])


def test_loading_takes_a_copy():
  arrays = ExpertStore(3, 16).arrays()
  store = ExpertStore(3, 16)
  store.load(arrays)
  store.add(successes(1))
  assert not arrays["added"].any() and not arrays["tokens"].any()
