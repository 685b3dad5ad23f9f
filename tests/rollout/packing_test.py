"""Packing loses nothing: places by hand, and the loss of packed rows is that of separate ones."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome import ipa, models
from rome.rollout import occupancy, pack
from rome.trajectory import Invalid, Valid
from tests.trajectories import make

CONFIG = models.PRESETS["micro"]
IPA = ipa.IPAConfig(gamma=0.5, failure_reward=-1.0)


def pack_(trajectories, **kwargs):
  defaults = {"row_length": 12, "max_chunks": 4, "rows_multiple": 1, "pad": 256}
  return pack(trajectories, IPA, 0, **(defaults | kwargs))


def test_places_by_hand():
  a = make("a#0", [(2, 2), (1, 1)], Valid(1.0), task="a")
  b = make("b#0", [(3, 4)], Valid(0.0))
  c = make("a#1", [(1, 2)], Valid(1.0), task="a")
  batch = pack_([a, b, c], rows_multiple=3)
  assert batch.tokens.shape == (3, 12) and batch.returns.shape == (3, 4)
  # b, the longest, opens row 0, where a has no room and c has. The third row fills up the
  # micro-batch.
  np.testing.assert_array_equal(batch.tokens[0], [*b.tokens, *c.tokens, *[256] * 2])
  np.testing.assert_array_equal(batch.tokens[1], [*a.tokens, *[256] * 6])
  assert batch.segment_ids[0].tolist() == [1] * 7 + [2] * 3 + [0] * 2
  assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 0]
  assert batch.chunk_ids[0].tolist() == [-1, -1, -1, 0, 0, 0, 0, -1, 1, 1, -1, -1]
  assert batch.chunk_ids[1].tolist() == [-1, -1, 0, 0, -1, 1, *[-1] * 6]
  assert batch.behavior_logp[0].tolist() == [0, 0, 0, -1, -1, -1, -1, 0, -1, -1, 0, 0]
  # gamma = 1/2: the last chunk of a success earns 1, the one before it 1/2; failure_reward is -1.
  assert batch.returns.tolist() == [[-1, 1, 0, 0], [0.5, 1, 0, 0], [0] * 4]
  assert batch.positive.tolist() == [[False, True, False, False], [True, True] + [False] * 2] + [
    [False] * 4
  ]
  assert batch.trajectory_ids.tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [0] * 4]
  assert batch.group_ids.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0] * 4]
  assert batch.versions.tolist() == [[7, 7, 0, 0], [7, 7, 0, 0], [0] * 4]
  assert occupancy(batch) == 16 / 36
  assert not batch.il_mask.any() and batch.old_logp is None
  assert (batch.tokens[2] == 256).all() and not batch.segment_ids[2].any()
  assert (batch.chunk_ids[2] == -1).all()


def test_a_trajectory_has_a_row_of_its_own_where_rows_are_not_shared():
  trajectories = [make(f"t#{i}", [(1, 2)], Valid(1.0)) for i in range(3)]
  batch = pack_(trajectories, rows_multiple=2, share_rows=False)
  assert batch.segment_ids.sum(axis=1).tolist() == [3, 3, 3, 0]
  assert batch.trajectory_ids[:, 0].tolist() == [0, 1, 2, 0]


def test_rows_are_filled():
  """First fit in the order given takes a row more in each case."""
  by_tokens = [make(f"t#{i}", [(1, n - 1)], Valid(1.0)) for i, n in enumerate([5, 5, 7, 7])]
  batch = pack_(by_tokens)
  assert batch.trajectory_ids[:, :2].tolist() == [[2, 0], [3, 1]] and occupancy(batch) == 1
  by_slots = [make(f"t#{i}", [(1, 1)] * n, Valid(1.0)) for i, n in enumerate([2, 2, 4, 4])]
  batch = pack_(by_slots, row_length=24, max_chunks=6)
  assert batch.trajectory_ids.tolist() == [[2] * 4 + [0] * 2, [3] * 4 + [1] * 2]
  # Where the longest with the next longest would leave room, others that leave none.
  mixed = [make(f"t#{i}", [(1, n - 1)], Valid(1.0)) for i, n in enumerate([6, 5, 5, 4, 2, 2])]
  batch = pack_(mixed, max_chunks=12)
  assert batch.trajectory_ids[:, :3].tolist() == [[0, 3, 4], [1, 2, 5]] and occupancy(batch) == 1


def test_the_rows_of_a_trajectory_by_hand():
  """Its contexts are sequences of their own, its returns those of one episode."""
  a = make("a#0", [(2, 2), (1, 1), (3, 4), (1, 2)], Valid(1.0), new_rows=[2])
  b = make("b#0", [(1, 2)], Valid(1.0))
  batch = pack_([a, b], rows_multiple=2)
  # Of 10 and 6 tokens; the latter has room for b, whose chunk follows behind.
  np.testing.assert_array_equal(batch.tokens[0], [*a.tokens[6:], 256, 256])
  np.testing.assert_array_equal(batch.tokens[1], [*a.tokens[:6], *b.tokens, *[256] * 3])
  assert batch.positions.tolist() == [[*range(10), 0, 0], [*range(6), 0, 1, 2, 0, 0, 0]]
  assert batch.segment_ids[1].tolist() == [1] * 6 + [2] * 3 + [0] * 3
  assert batch.chunk_ids[0].tolist() == [-1] * 3 + [0] * 4 + [-1, 1, 1, -1, -1]
  assert batch.chunk_ids[1].tolist() == [-1, -1, 0, 0, -1, 1, -1, 2, 2, -1, -1, -1]
  # gamma = 1/2 over all four chunks.
  assert batch.returns.tolist() == [[0.5, 1, 0, 0], [0.125, 0.25, 1, 0]]
  assert batch.trajectory_ids.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]
  assert batch.group_ids.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]
  alone = pack_([b, a], rows_multiple=2, share_rows=False)
  assert alone.segment_ids.max() == 1
  assert alone.trajectory_ids[:, 0].tolist() == [1, 1, 0, 0] and alone.chunk_ids[3].max() == -1


def test_more_chunks_than_a_row_has():
  long = make("a#0", [(1, 1)] * 6, Valid(1.0), new_rows=[2, 4])
  batch = pack_([long], max_chunks=2, rows_multiple=3)
  assert batch.returns.tolist() == [[1 / 32, 1 / 16], [1 / 8, 1 / 4], [1 / 2, 1]]


def test_the_rows_of_a_trajectory_stay_in_one_micro_batch():
  """Where rows are filled in any order, one of t#2 would lie beside t#0 or t#1."""
  many = [
    make(f"t#{i}", [(1, 8)] * n, Valid(1.0), new_rows=range(1, n)) for i, n in enumerate([3, 3, 2])
  ]
  batch = pack_(many, rows_multiple=4)
  assert batch.trajectory_ids[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 2, 2, 0, 0]
  # What is left over is filled: no call more for these.
  short = [make(f"s#{i}", [(1, 8)], Valid(1.0)) for i in range(4)]
  assert len(pack_([*short, *many], rows_multiple=4).tokens) == 12
  with pytest.raises(ValueError, match="trajectory t#0 has 3 rows, .* 2 rows does not hold; raise"):
    pack_(many, rows_multiple=2)


lengths = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.lists(lengths, min_size=7, max_size=7), st.integers(1, 4))
def test_every_token_is_packed_once(shapes, multiple):
  trajectories = [make(f"t#{i}", chunks, Valid(float(i % 2))) for i, chunks in enumerate(shapes)]
  batch = pack_(trajectories, row_length=40, max_chunks=6, rows_multiple=multiple)
  assert len(batch.tokens) % multiple == 0
  found = {}
  for row, segments in enumerate(batch.segment_ids):
    for segment in range(1, segments.max() + 1):
      at = (row, segments == segment)
      slots = batch.chunk_ids[at]
      n = batch.trajectory_ids[row, slots.max()]
      first = slots[slots >= 0].min()
      found[n] = (
        batch.tokens[at].tolist(),
        np.where(slots >= 0, slots - first, -1).tolist(),
        batch.behavior_logp[at].tolist(),
        batch.positions[at].tolist(),
      )
  for n, t in enumerate(trajectories):
    place = list(range(len(t.tokens)))
    assert found[n] == (t.tokens.tolist(), t.call_ids.tolist(), t.logps.tolist(), place)
  assert len(found) == len(trajectories)


rows_of_chunks = st.lists(
  st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=3),
  min_size=1,
  max_size=4,
)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
  st.lists(rows_of_chunks, min_size=6, max_size=6), st.integers(4, 6), st.booleans(), st.booleans()
)
def test_every_row_is_packed_once_and_with_its_trajectory(shapes, multiple, share, imitate):
  trajectories = []
  for i, rows in enumerate(shapes):
    starts = np.cumsum([len(row) for row in rows])[:-1].tolist()
    chunks = [chunk for row in rows for chunk in row]
    trajectories.append(make(f"t#{i}", chunks, Valid(float(i % 2)), new_rows=starts))
  played = trajectories[: len(trajectories) // 2] if imitate else trajectories
  batch = pack_(
    played, experts=trajectories[len(played) :], row_length=28, max_chunks=4,
    rows_multiple=multiple, share_rows=share,
  )  # fmt: skip
  assert len(batch.tokens) % multiple == 0
  assert share or batch.segment_ids.max() == 1
  found, micro = {}, {}
  for number, segments in enumerate(batch.segment_ids):
    for segment in range(1, segments.max() + 1):
      at = (number, segments == segment)
      slots = batch.chunk_ids[at]
      used = np.unique(slots[slots >= 0])
      n = int(batch.trajectory_ids[number, used[0]])
      assert used.tolist() == list(range(used[0], used[-1] + 1))
      assert (batch.trajectory_ids[number, used] == n).all()
      assert (batch.il_mask[number, used] == (n >= len(played))).all()
      assert batch.positions[at].tolist() == list(range(len(slots)))
      micro.setdefault(n, set()).add(number // multiple)
      row = tuple(np.where(slots >= 0, slots - used[0], -1).tolist())
      entry = batch.tokens[at].tolist(), row, batch.behavior_logp[at].tolist()
      found.setdefault(n, []).append((entry, batch.returns[number, used].tolist()))
  assert all(len(calls) == 1 for calls in micro.values())
  for n, t in enumerate(trajectories):
    last = float(n % 2) or IPA.failure_reward
    wanted = []
    for row in t.rows:
      calls = t.call_ids[row.tokens]
      own = np.where(calls >= 0, calls - row.chunks.start, -1)
      entry = t.tokens[row.tokens].tolist(), tuple(own.tolist()), t.logps[row.tokens].tolist()
      places = range(row.chunks.start, row.chunks.stop)
      wanted.append((entry, [last * IPA.gamma ** (t.num_chunks - 1 - k) for k in places]))
    assert sorted(found[n]) == sorted(wanted)


init = jax.jit(models.init_params, static_argnums=0)


@jax.jit
def score(params, batch):
  dense = models.Compute(experts="dense")
  logits = models.forward(CONFIG, params, batch.tokens, batch.segment_ids, batch.positions, dense)
  return models.token_logps(logits, batch.tokens, models.Sampling())[0]


@pytest.mark.slow
def test_the_loss_of_packed_rows_is_that_of_separate_rows():
  params = init(CONFIG, jax.random.key(0))
  shapes = [[(4, 2), (1, 3)], [(2, 5), (2, 1)], [(3, 3), (3, 3)], [(6, 1), (1, 1)]]
  trajectories = [
    make(f"t#{i}", chunks, Valid(float(i % 2)), logp=-5.4) for i, chunks in enumerate(shapes)
  ]
  packed = pack_(trajectories, row_length=24, max_chunks=8)
  alone = pack_(trajectories, row_length=12, max_chunks=2)
  assert len(packed.tokens) == 2 and len(alone.tokens) == 4
  totals = [jax.tree.leaves(ipa.loss_totals(batch, 4)) for batch in (packed, alone)]
  for a, b in zip(*totals, strict=True):
    np.testing.assert_array_equal(a, b)
  # The normaliser that reads the most of a batch: tokens of each trajectory, wherever it lies.
  config = dataclasses.replace(IPA, normaliser="trajectory_mean")
  one, other = (float(ipa.ipa_loss(score(params, b), b, config)[0]) for b in (packed, alone))
  assert abs(one) > 0.1 and one == pytest.approx(other, rel=1e-5)


def test_experts_lie_behind_and_need_no_logps():
  episode = make("a#0", [(2, 2), (1, 1)], Valid(0.0))
  demo = make("d#0", [(2, 3)], Valid(1.0), logp=np.nan)
  batch = pack_([episode], experts=[demo])
  assert batch.il_mask.tolist() == [[False, False, True, False]]
  assert batch.trajectory_ids.tolist() == [[0, 0, 1, 0]]
  assert batch.returns.tolist() == [[-0.5, -1.0, 1.0, 0.0]]
  np.testing.assert_array_equal(batch.tokens[0, :11], [*episode.tokens, *demo.tokens])
  with pytest.raises(ValueError, match="behavior_logp: row 0, token 2 is not finite"):
    pack_([demo])


def test_nothing_packs_into_one_micro_batch_of_padding():
  batch = pack_([], rows_multiple=2)
  assert batch.tokens.shape == (2, 12) and (batch.chunk_ids == -1).all()


@pytest.mark.parametrize(
  ("chunks", "reward", "message"),
  [
    ([(9, 4)], Valid(1.0), "trajectory t#0 has 13 tokens and 1 chunks, a row holds 12 and 4"),
    ([(1, 1)] * 5, Valid(1.0), "trajectory t#0 has 10 tokens and 5 chunks, a row holds 12 and 4"),
    ([(1, 1)], Invalid("sandbox lost"), "trajectory t#0 has no valid reward: .*sandbox lost"),
  ],
)
def test_what_does_not_fit_is_named(chunks, reward, message):
  with pytest.raises(ValueError, match=message):
    pack_([make("t#0", chunks, reward)])


def test_a_row_that_does_not_fit_is_named():
  message = "row 1 of trajectory t#0 has 13 tokens and 1 chunks, a row holds 12 and 4"
  with pytest.raises(ValueError, match=message):
    pack_([make("t#0", [(1, 1), (9, 4)], Valid(1.0), new_rows=[1])])


def test_a_baseline_is_of_the_reinforced_alone():
  """Experts neither shift the mean nor are shifted by it."""
  config = ipa.IPAConfig(gamma=1.0, centre="batch")
  episodes = [make("a#0", [(2, 2)], Valid(1.0)), make("b#0", [(2, 2)], Valid(0.0))]
  expert = make("c#0", [(2, 2)], Valid(1.0))
  batch = pack(
    episodes, config, 0, row_length=4, max_chunks=1, rows_multiple=1, pad=256, experts=[expert]
  )
  assert batch.returns[:, 0].tolist() == [0.5, -0.5, 1.0]


def test_what_a_limit_cut_off_can_be_masked():
  config = ipa.IPAConfig(gamma=1.0, failure_reward=-1.0, truncated_episodes="mask_negative")
  cut = dataclasses.replace(make("a#0", [(2, 2)], Valid(0.0)), end_reason="max_turns")
  gave_up = make("b#0", [(2, 2)], Valid(0.0))
  batch = pack([cut, gave_up], config, 0, row_length=4, max_chunks=1, rows_multiple=1, pad=256)
  assert batch.returns[:, 0].tolist() == [0.0, -1.0]
