"""Eq. 7 and the shaping of rewards."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from rome import ipa
from tests.ipa import oracle

jitted_returns = jax.jit(ipa.discounted_chunk_returns)


class DiscountedChunkReturnsTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.named_parameters(
    ("success", [0, 0, 1], 0.9, [0.81, 0.9, 1.0]),
    ("failure", [0, 0, -1], 0.9, [-0.81, -0.9, -1.0]),
    ("undiscounted", [0, 0, 1], 1.0, [1, 1, 1]),
    ("intermediate_rewards", [1, 2, 4], 0.5, [3.0, 4.0, 4.0]),
    ("only_an_intermediate_reward", [0, 1, 0], 0.5, [0.5, 1.0, 0.0]),
  )
  def test_literals(self, rewards, gamma, expected):
    got = self.variant(ipa.discounted_chunk_returns)(
      jnp.array([rewards], jnp.float32), jnp.array([3]), gamma
    )
    np.testing.assert_allclose(got, [expected], rtol=1e-6)

  def test_padding_is_not_read_and_rows_do_not_meet(self):
    rewards = jnp.array([[0.0, 1.0, jnp.nan], [jnp.nan] * 3, [1.0, 0.0, 1.0]])
    got = ipa.discounted_chunk_returns(rewards, jnp.array([2, 0, 3]), 0.5)
    np.testing.assert_array_equal(got, [[0.5, 1, 0], [0, 0, 0], [1.25, 0.5, 1]])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1.0))
def test_agrees_with_the_double_sum(seed, gamma):
  rng = np.random.default_rng(seed)
  counts = rng.integers(0, 7, 5)
  rewards = rng.normal(size=(5, 6))
  with jax.enable_x64(True):
    got = jitted_returns(rewards, counts, gamma)
  for row, count in enumerate(counts):
    expected = oracle.returns(rewards[row, :count], gamma) + [0.0] * (6 - count)
    np.testing.assert_allclose(got[row], expected, rtol=1e-9, atol=1e-12)


class ShapedReturnsTest(chex.TestCase):
  REWARDS = jnp.array([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 9.0, 9.0], [2.0, -2.0, 0.0]])
  COUNTS = jnp.array([3, 3, 1, 2])

  @chex.variants(with_jit=True, without_jit=True)
  def test_failure_reward_ends_what_is_not_positive(self):
    config = ipa.IPAConfig(gamma=0.5, failure_reward=-1.0)
    shaped = self.variant(lambda step: ipa.shaped_returns(self.REWARDS, self.COUNTS, step, config))
    returns, positive = shaped(0)
    np.testing.assert_array_equal(positive, [True, False, False, False])
    # The last: rewards 2, -2 sum to 0, so it is no success; its own rewards stay: 2 + 0.5 (-2 - 1).
    expected = [[0.25, 0.5, 1], [-0.25, -0.5, -1], [-1, 0, 0], [0.5, -3, 0]]
    np.testing.assert_array_equal(returns, expected)

  def test_by_default_failures_carry_nothing(self):
    returns, _ = ipa.shaped_returns(self.REWARDS[:3], self.COUNTS[:3], 0, ipa.IPAConfig())
    np.testing.assert_array_equal(returns[1:], np.zeros((2, 3)))

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters((0, 0.0), (9, 0.0), (10, 0.25), (11, 0.25))
  def test_negatives_start_at_their_step(self, step, scale):
    config = ipa.IPAConfig(
      gamma=1.0, failure_reward=-1.0, negative_start_step=10, negative_weight=0.25
    )
    shaped = self.variant(lambda step: ipa.shaped_returns(self.REWARDS, self.COUNTS, step, config))
    returns, _ = shaped(step)
    np.testing.assert_array_equal(returns[0], [1, 1, 1])
    np.testing.assert_array_equal(returns[1], [-scale] * 3)


class BaselineAndScaleTest(chex.TestCase):
  """Four trajectories, two groups; rewards (1, 0) and (3, 1); the first has two chunks."""

  REWARDS = jnp.array([[0.0, 1.0], [0.0, jnp.nan], [3.0, jnp.nan], [1.0, jnp.nan]])
  COUNTS, GROUPS = jnp.array([2, 1, 1, 1]), jnp.array([2, 2, 0, 0])

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    # The baseline is part of the last reward: the first chunk sees it discounted.
    ("none", "none", [[0.5, 1], [0, 0], [3, 0], [1, 0]]),
    ("group", "none", [[0.25, 0.5], [-0.5, 0], [1, 0], [-1, 0]]),
    ("batch", "none", [[-0.125, -0.25], [-1.25, 0], [1.75, 0], [-0.25, 0]]),
    ("leave_one_out", "none", [[0.5, 1], [-1, 0], [2, 0], [-2, 0]]),
    ("group", "group", [[0.5, 1], [-1, 0], [1, 0], [-1, 0]]),
    ("none", "group", [[1, 2], [0, 0], [3, 0], [1, 0]]),
  )
  def test_literals(self, centre, scale, expected):
    config = ipa.IPAConfig(gamma=0.5, centre=centre, scale=scale)
    shaped = self.variant(
      lambda groups: ipa.shaped_returns(self.REWARDS, self.COUNTS, 0, config, groups)
    )
    returns, positive = shaped(self.GROUPS)
    np.testing.assert_allclose(returns, expected, rtol=1e-6)
    np.testing.assert_array_equal(positive, [True, False, True, True])  # before any shaping

  def test_scaling_by_the_batch(self):
    config = ipa.IPAConfig(gamma=1.0, centre="batch", scale="batch")
    returns, _ = ipa.shaped_returns(self.REWARDS, self.COUNTS, 0, config)
    rewards = np.array([1.0, 0.0, 3.0, 1.0])
    expected = (rewards - rewards.mean()) / rewards.std()
    np.testing.assert_allclose(returns[:, 0], expected, rtol=1e-6)

  def test_a_group_that_agrees_or_is_alone_is_not_scaled(self):
    config = ipa.IPAConfig(centre="leave_one_out", scale="group")
    returns, _ = ipa.shaped_returns(
      jnp.array([[1.0], [1.0], [0.7]]), jnp.array([1, 1, 1]), 0, config, jnp.array([0, 0, 1])
    )
    np.testing.assert_allclose(returns[:, 0], [0.0, 0.0, 0.7])

  def test_the_clip_is_last_but_for_the_weight_of_negatives(self):
    config = ipa.IPAConfig(
      gamma=1.0, centre="group", advantage_clip=0.75, negative_weight=0.5, failure_reward=-1.0
    )
    returns, _ = ipa.shaped_returns(self.REWARDS, self.COUNTS, 0, config, self.GROUPS)
    np.testing.assert_allclose(returns[:, 0], [0.75, -0.375, 0.75, -0.75])

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    ("keep", [1, -1, 1, -1]), ("mask_negative", [1, -1, 1, 0]), ("mask", [1, -1, 0, 0])
  )
  def test_truncated_episodes(self, mode, expected):
    config = ipa.IPAConfig(gamma=1.0, failure_reward=-1.0, truncated_episodes=mode)
    shaped = self.variant(
      lambda cut: ipa.shaped_returns(
        jnp.array([[1.0], [0.0], [1.0], [0.0]]), jnp.ones(4, int), 0, config, truncated_N=cut
      )
    )
    returns, positive = shaped(jnp.array([False, False, True, True]))
    np.testing.assert_array_equal(returns[:, 0], expected)
    np.testing.assert_array_equal(positive, [True, False, True, False])

  @parameterized.parameters(
    ("centre", "group", "group_ids_N"),
    ("centre", "leave_one_out", "group_ids_N"),
    ("scale", "group", "group_ids_N"),
    ("truncated_episodes", "mask", "truncated_N"),
  )
  def test_what_a_setting_needs_is_asked_for(self, name, value, needs):
    config = ipa.IPAConfig(**{name: value})
    with self.assertRaisesRegex(ValueError, rf"IPAConfig\.{name}='{value}' needs {needs}"):
      ipa.shaped_returns(self.REWARDS, self.COUNTS, 0, config)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["group", "leave_one_out"]))
def test_baselines_agree_with_the_definition(seed, centre):
  rng = np.random.default_rng(seed)
  rewards, groups = rng.normal(size=7), rng.integers(0, 3, 7)
  config = ipa.IPAConfig(gamma=1.0, centre=centre, scale="group")
  with jax.enable_x64(True):
    got, _ = ipa.shaped_returns(rewards[:, None], np.ones(7, int), 0, config, groups)
  for i, reward in enumerate(rewards):
    members = rewards[groups == groups[i]]
    others = [r for j, r in enumerate(rewards) if groups[j] == groups[i] and j != i]
    baseline = np.mean(members) if centre == "group" else np.mean(others) if others else 0.0
    deviation = np.std(members) if len(members) > 1 else 1.0
    np.testing.assert_allclose(got[i, 0], (reward - baseline) / deviation, rtol=1e-9, atol=1e-12)
