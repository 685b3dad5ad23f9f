"""Starts, crucial chunks, experts and what is imitated: literals and a second machine."""

import dataclasses
import io
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.ipa import resampling

Config = resampling.ResamplingConfig

seeds = st.integers(0, 2**32 - 1)
update = jax.jit(resampling.rollback_update, static_argnums=3)
refresh = jax.jit(resampling.rollback_refresh)
anchor_starts = jax.jit(resampling.anchor_starts, static_argnums=4)


def below(x, n, next_x, next_n, level):
  """The z-test from its textbook form, one pair of counts at a time."""
  if n == 0 or next_n == 0 or (x + next_x) in (0, n + next_n):
    return False
  pooled = (x + next_x) / (n + next_n)
  z = (next_x / next_n - x / n) / math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / next_n))
  return 0.5 * math.erfc(z / math.sqrt(2)) < level


class Machine:
  """One task's rollback, in Python and by names instead of masks."""

  def __init__(self, num_chunks):
    self.done = False
    self.marked = set()
    self.restart(num_chunks)

  def restart(self, num_chunks):
    self.num_chunks, self.pointer, self.groups = num_chunks, max(num_chunks - 1, 0), {}
    self.marked.clear()

  def group(self, x, n, needed, step, level):
    if n == 0:
      return
    higher = sorted(start for start in self.groups if start > self.pointer)
    if self.pointer not in self.groups and higher:
      if below(x, n, *self.groups[higher[0]], level):
        self.marked.update(range(self.pointer, higher[0]))
    self.groups[self.pointer] = (x, n)
    if x >= needed[n]:
      self.done = self.done or self.pointer == 0
      self.pointer = max(self.pointer - step, 0)

  def new_expert(self, num_chunks, shared):
    if not self.done and (self.num_chunks == 0 or self.pointer > shared):
      self.restart(num_chunks)
      return
    self.num_chunks = num_chunks
    self.groups = {start: counts for start, counts in self.groups.items() if start <= shared}
    self.marked = {chunk for chunk in self.marked if chunk < shared}


def check_against(state, machines):
  state = jax.tree.map(np.asarray, state)
  np.testing.assert_array_equal(state.pointer, [m.pointer for m in machines])
  np.testing.assert_array_equal(state.num_chunks, [m.num_chunks for m in machines])
  np.testing.assert_array_equal(state.done, [m.done for m in machines])
  for row, machine in enumerate(machines):
    assert set(np.flatnonzero(state.crucial[row])) == machine.marked
    sampled = np.flatnonzero(state.attempts[row])
    table = {int(s): (int(state.successes[row, s]), int(state.attempts[row, s])) for s in sampled}
    assert table == machine.groups
    assert state.successes[row].sum() == sum(x for x, _ in table.values())


# Of n samples, this many master a start at threshold 0.8.
NEEDED = {1: 1, 2: 2, 3: 3, 4: 4, 5: 4, 6: 5, 7: 6, 8: 7}


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 3), st.sampled_from([0.01, 0.05, 0.2]))
def test_agrees_with_a_machine_in_python(seed, step, level):
  """Tasks, groups of any size, none among them, and new experts in between."""
  rng = np.random.default_rng(seed)
  config = Config(rollback_step=step, crucial_level=level)
  num_chunks = rng.integers(0, 7, 8)
  num_chunks[:2] = 0, 6
  state = resampling.rollback_init(num_chunks, 6)
  machines = [Machine(int(k)) for k in num_chunks]
  for _ in range(20):
    attempts = rng.integers(0, 9, 8)
    successes = rng.binomial(attempts, rng.choice([0.1, 0.9, 1.0], 8))
    before, state = state, update(state, successes, attempts, config)
    for machine, x, n in zip(machines, successes.tolist(), attempts.tolist(), strict=True):
      machine.group(x, n, NEEDED, step, level)
    check_against(state, machines)
    assert (state.pointer <= before.pointer).all() and (state.pointer >= 0).all()
    assert (state.done >= before.done).all() and (state.crucial >= before.crucial).all()
    if rng.random() < 0.3:
      replaced = rng.random(8) < 0.5
      shared = rng.integers(0, np.maximum(state.num_chunks, 1))
      chunks = rng.integers(shared + 1, 7)
      state = refresh(state, replaced, chunks, shared)
      for row in np.flatnonzero(replaced):
        machines[row].new_expert(int(chunks[row]), int(shared[row]))
      check_against(state, machines)


def walk(num_chunks, groups, config, max_chunks=4):
  """The states that one task goes through."""
  state = resampling.rollback_init(jnp.array([num_chunks]), max_chunks)
  states = [state]
  for x, n in groups:
    state = update(state, jnp.array([x]), jnp.array([n]), config)
    states.append(state)
  return states


def pointers(states):
  return [int(s.pointer[0]) for s in states]


class RollbackTest(chex.TestCase):
  def test_walk_to_the_initial_state(self):
    """Five samples a group, four are enough; chunk 1 is where the policy fails at first."""
    groups = [(5, 5), (4, 5), (0, 5), (3, 5), (4, 5), (0, 0), (3, 5), (5, 5), (0, 5)]
    states = walk(4, groups, Config())
    self.assertEqual(pointers(states), [3, 2, 1, 1, 1, 0, 0, 0, 0, 0])
    self.assertEqual([bool(s.done[0]) for s in states], [False] * 8 + [True] * 2)
    # 0 of 5 against 4 of 5 is a drop, p = 0.005; 3 of 5 against 4 of 5 is none.
    none, second = [False] * 4, [False, True, False, False]
    self.assertEqual([s.crucial[0].tolist() for s in states], [none] * 3 + [second] * 7)
    np.testing.assert_array_equal(states[-1].successes, [[0, 4, 4, 5, 0]])
    np.testing.assert_array_equal(states[-1].attempts, [[5, 5, 5, 5, 0]])

  def test_only_the_first_group_from_a_start_can_be_a_drop(self):
    """3 of 5 after 5 of 5 is none (p = 0.057), and a later bad group is not a crossing."""
    states = walk(2, [(5, 5), (3, 5), (0, 5)], Config())
    assert not states[-1].crucial.any()
    assert walk(2, [(5, 5), (0, 5)], Config())[-1].crucial[0].tolist()[:2] == [True, False]

  @pytest.mark.slow
  def test_a_step_of_two_marks_both_chunks_and_stops_at_zero(self):
    states = walk(4, [(8, 8), (1, 8), (8, 8), (8, 8)], Config(rollback_step=2))
    self.assertEqual(pointers(states), [3, 1, 1, 0, 0])
    self.assertEqual(states[-1].crucial[0].tolist(), [False, True, True, False])
    assert bool(states[-1].done[0]) and not states[-2].done[0]

  def test_a_task_without_an_expert_is_done_when_its_initial_state_is_mastered(self):
    states = walk(0, [(3, 5), (4, 5)], Config())
    self.assertEqual(pointers(states), [0, 0, 0])
    self.assertEqual([bool(s.done[0]) for s in states], [False, False, True])

  @pytest.mark.slow
  def test_thresholds_are_exact_in_counts(self):
    """x of n masters at threshold x / n and x - 1 does not, though 7 / 13 * 13 > 7 in float32."""
    pairs = [(x, n) for n in range(1, 65) for x in range(1, n + 1)]
    for x, n in pairs[::31] + [(7, 13), (15, 19), (3, 21)]:
      state = resampling.rollback_init(jnp.array([3, 3]), 3)
      config = Config(master_threshold=x / n)
      got = resampling.rollback_update(state, jnp.array([x, x - 1]), jnp.array([n, n]), config)
      self.assertEqual(got.pointer.tolist(), [1, 2], (x, n))

  @pytest.mark.slow
  def test_agrees_with_the_test_on_the_tables(self):
    """At a step of one, what is marked on arrival is what `crucial_chunks` says of the tables."""
    rng = np.random.default_rng(0)
    state = resampling.rollback_init(jnp.full(64, 6), 6)
    marked = 0
    for _ in range(8):
      attempts = np.full(64, 8)
      before, state = state, update(state, rng.binomial(8, rng.random(64)), attempts, Config())
      fresh = np.asarray(before.attempts == 0) & np.asarray(state.attempts > 0)
      table = resampling.crucial_chunks(state.successes, state.attempts, 0.05)
      new = np.asarray(state.crucial & ~before.crucial)
      np.testing.assert_array_equal(new, np.asarray(table) & fresh[:, :-1])
      marked += new.sum()
    assert marked > 5

  @pytest.mark.slow
  def test_eager_jitted_and_mapped_agree(self):
    rng = np.random.default_rng(1)
    attempts = rng.integers(0, 9, (3, 6, 8))
    successes = rng.binomial(attempts, 0.8)
    start = resampling.rollback_init(rng.integers(0, 7, 8), 6)
    mapped = jax.tree.map(lambda x: jnp.stack([x] * 3), start)
    over = jax.vmap(resampling.rollback_update, in_axes=(0, 0, 0, None))
    for t in range(6):
      mapped = over(mapped, successes[:, t], attempts[:, t], Config())
    for seed in range(3):
      eager = jitted = start
      for t in range(6):
        counts = successes[seed, t], attempts[seed, t], Config()
        eager, jitted = resampling.rollback_update(eager, *counts), update(jitted, *counts)
      chex.assert_trees_all_equal(eager, jitted)
      chex.assert_trees_all_equal(eager, jax.tree.map(lambda x, i=seed: x[i], mapped))

  @pytest.mark.slow
  def test_a_state_survives_as_plain_arrays(self):
    state = walk(4, [(5, 5), (0, 5)], Config())[-1]
    file = io.BytesIO()
    fields = [f.name for f in dataclasses.fields(state)]
    np.savez(file, **{name: getattr(state, name) for name in fields})
    file.seek(0)
    loaded = resampling.RollbackState(**np.load(file))
    for step in (resampling.rollback_update, update):
      after = step(loaded, np.array([5]), np.array([5]), Config())
      chex.assert_trees_all_equal(after, update(state, jnp.array([5]), jnp.array([5]), Config()))
      chex.assert_trees_all_equal_dtypes(after, state)

  def test_shapes_are_checked(self):
    state = resampling.rollback_init(jnp.array([2, 2]), 3)
    with self.assertRaises(AssertionError):
      resampling.rollback_update(state, jnp.array([1]), jnp.array([1]), Config())


class RollbackRefreshTest(chex.TestCase):
  def state(self):
    """Three tasks at start 1 of 4 chunks, chunk 1 crucial; the fourth has no expert."""
    state = resampling.rollback_init(jnp.array([4, 4, 4, 0]), 5)
    for x in (5, 5, 0):
      state = update(state, jnp.full(4, x), jnp.array([5, 5, 5, 0]), Config())
    return state

  @chex.variants(with_jit=True, without_jit=True)
  @pytest.mark.slow
  def test_what_a_new_expert_shares_stays(self):
    before = self.state()
    self.assertEqual(before.pointer.tolist(), [1, 1, 1, 0])
    after = self.variant(resampling.rollback_refresh)(
      before, jnp.array([1, 1, 0, 1]), jnp.array([5, 3, 9, 3]), jnp.array([2, 0, 0, 0])
    )
    # Sampled from start 2: goes on. From the initial state: restarts. None. The first: begins.
    self.assertEqual(after.pointer.tolist(), [1, 2, 1, 2])
    self.assertEqual(after.num_chunks.tolist(), [5, 3, 4, 3])
    np.testing.assert_array_equal(after.attempts[0], [0, 5, 5, 0, 0, 0])
    np.testing.assert_array_equal(after.successes[0], [0, 0, 5, 0, 0, 0])
    self.assertEqual(np.argwhere(after.crucial).tolist(), [[0, 1], [2, 1]])
    np.testing.assert_array_equal(after.attempts[1], [0] * 6)
    chex.assert_trees_all_equal(
      jax.tree.map(lambda x: x[2], after), jax.tree.map(lambda x: x[2], before)
    )

  def test_successes_from_the_pointer_never_set_a_task_back(self):
    """Each group's successes become the expert, as they do in sequential rollback."""
    state = resampling.rollback_init(jnp.array([4]), 6)
    seen = []
    for num_chunks in (5, 4, 6, 3, 2):
      start, seen = state.pointer, [*seen, int(state.pointer[0])]
      state = update(state, jnp.array([5]), jnp.array([5]), Config())
      state = refresh(state, jnp.array([True]), jnp.array([num_chunks]), start)
    self.assertEqual(seen, [3, 2, 1, 0, 0])
    assert bool(state.done[0])

  def test_a_drop_is_seen_across_a_refresh(self):
    """The group that mastered start 3 is what start 2 is compared with."""
    state = resampling.rollback_init(jnp.array([4]), 5)
    state = update(state, jnp.array([5]), jnp.array([5]), Config())
    state = refresh(state, jnp.array([True]), jnp.array([5]), jnp.array([3]))
    state = update(state, jnp.array([0]), jnp.array([5]), Config())
    self.assertEqual(np.flatnonzero(state.crucial[0]).tolist(), [2])

  def test_a_task_that_is_done_stays_done(self):
    state = walk(1, [(5, 5)], Config())[-1]
    state = refresh(state, jnp.array([True]), jnp.array([4]), jnp.array([0]))
    assert (
      bool(state.done[0]) and state.pointer.tolist() == [0] and state.num_chunks.tolist() == [4]
    )


class CrucialChunksTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @pytest.mark.slow
  def test_indices(self):
    """p = .1, .1, .9, .9, unknown: the drop is between starts 1 and 2, which is chunk 1."""
    successes, attempts = jnp.array([[1, 1, 9, 9, 0]]), jnp.array([[10, 10, 10, 10, 0]])
    got = self.variant(lambda x, n: resampling.crucial_chunks(x, n, 0.05))(successes, attempts)
    np.testing.assert_array_equal(got, [[False, True, False, False]])

  @parameterized.parameters(
    # 45 of 100 against 60 of 100: pooled .525, z = .15 / .0706223 = 2.12398, p = .016836.
    (45, 100, 60, 100, 0.0169, True),
    (45, 100, 60, 100, 0.0168, False),
    (60, 100, 45, 100, 0.4, False),  # A rise toward the initial state is none.
    (0, 1, 1, 1, 0.05, False),  # z = sqrt 2, p = .0786: one attempt a side is never enough.
    (0, 1, 1, 1, 0.08, True),
    (0, 2, 2, 2, 0.05, True),  # z = 2, p = .0228, though Fisher's exact test has 1/6.
    (0, 0, 4, 4, 0.49, False),
    (0, 4, 0, 0, 0.49, False),
    (0, 4, 0, 4, 0.49, False),
    (4, 4, 4, 4, 0.49, False),
    (2, 4, 2, 4, 0.49, False),
  )
  @pytest.mark.slow
  def test_literals(self, x, n, next_x, next_n, level, expected):
    got = resampling.crucial_chunks(jnp.array([[x, next_x]]), jnp.array([[n, next_n]]), level)
    self.assertEqual(got.tolist(), [[expected]])

  @parameterized.parameters(0.01, 0.05, 0.2)
  @pytest.mark.slow
  def test_every_small_table_agrees_with_the_normal_tail(self, level):
    counts = [(x, n) for n in range(9) for x in range(n + 1)]
    pairs = np.array(list(itertools.product(counts, counts)))  # [P, 2 starts, (x, n)]
    got = resampling.crucial_chunks(pairs[..., 0], pairs[..., 1], level)[:, 0]
    np.testing.assert_array_equal(got, [below(*a, *b, level) for a, b in pairs.tolist()])

    known = (pairs[:, :, 1] > 0).all(1)
    (x, n), (next_x, next_n) = pairs[known].transpose(1, 2, 0)
    pooled = (x + next_x) / (n + next_n)
    with np.errstate(divide="ignore", invalid="ignore"):
      z = (next_x / next_n - x / n) / np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / next_n))
    np.testing.assert_array_equal(np.asarray(got)[known], scipy.stats.norm.sf(z) < level)
    assert 0 < got.sum() < known.sum()


def anchors(num_chunks, mode="uniform", num_anchors=4, tasks=None, iteration=0, seed=0):
  num_chunks = jnp.asarray(num_chunks)
  tasks = jnp.arange(len(num_chunks)) if tasks is None else jnp.asarray(tasks)
  config = Config(anchors=num_anchors, anchor_mode=mode)
  return np.asarray(anchor_starts(num_chunks, tasks, iteration, jax.random.key(seed), config))


class AnchorsTest(chex.TestCase):
  def test_uniform_literals(self):
    got = anchors([10, 4, 3, 2, 1, 0, 8])
    expected = [[0, 3, 6, 9], [0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 0, 1], [0] * 4, [0] * 4]
    np.testing.assert_array_equal(got, [*expected, [0, 2, 4, 7]])
    np.testing.assert_array_equal(anchors([10, 0], num_anchors=1), [[0], [0]])

  @parameterized.product(mode=resampling.ANCHOR_MODES, num_anchors=[1, 2, 4, 7])
  def test_properties(self, mode, num_anchors):
    num_chunks = np.arange(12)
    for iteration in range(5):
      got = anchors(num_chunks, mode, num_anchors, iteration=iteration)
      assert got.shape == (12, num_anchors) and got.dtype == np.int32
      assert (got[:, 0] == 0).all() and (np.diff(got, axis=1) >= 0).all()
      assert (got <= np.maximum(num_chunks - 1, 0)[:, None]).all()
      for k, starts in zip(num_chunks, got, strict=True):
        # Distinct while there are enough, and every start when there are not.
        self.assertLen(set(starts.tolist()), min(max(int(k), 1), num_anchors))

  @pytest.mark.slow
  def test_a_draw_is_the_tasks_own(self):
    """Neither order nor company change it; another iteration, task or seed does."""
    base = anchors([30] * 6, "random", tasks=[5, 8, 2, 9, 11, 3])
    np.testing.assert_array_equal(anchors([30] * 2, "random", tasks=[9, 5]), base[[3, 0]])
    for other in (
      anchors([30] * 6, "random", tasks=[5, 8, 2, 9, 11, 3], iteration=1),
      anchors([30] * 6, "random", tasks=[5, 8, 2, 9, 11, 3], seed=1),
      base[::-1],
    ):
      assert (base != other).any(axis=1).all()

  def test_random_subsets_are_equally_likely(self):
    """3 of the starts 1..5: ten subsets, 400 of 4000 draws each (sd 19)."""
    got = anchors([6] * 4000, "random")
    subsets, counts = np.unique(got[:, 1:], axis=0, return_counts=True)
    np.testing.assert_array_equal(subsets, list(itertools.combinations(range(1, 6), 3)))
    assert abs(counts - 400).max() < 100


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("master_threshold", 0.0),
    ("master_threshold", 1.1),
    ("master_threshold", math.nan),
    ("master_threshold", True),
    ("master_threshold", "0.8"),
    ("rollback_step", 0),
    ("rollback_step", 1.0),
    ("rollback_step", True),
    ("anchors", 0),
    ("anchors", 2.5),
    ("anchor_mode", "even"),
    ("crucial_level", 0.0),
    ("crucial_level", 0.5),
    ("crucial_level", None),
    ("il_mode", "sometimes"),
  ],
)
def test_a_bad_setting_is_named(name, value):
  with pytest.raises(ValueError, match=rf"^ResamplingConfig\.{name} must be .*, got "):
    Config(**{name: value})


def test_defaults_and_extremes_pass():
  config = Config()
  assert (config.master_threshold, config.rollback_step, config.crucial_level) == (0.8, 1, 0.05)
  assert (config.anchors, config.anchor_mode) == (4, "uniform")
  assert hash(Config(master_threshold=1, crucial_level=0.49)) != hash(config)
