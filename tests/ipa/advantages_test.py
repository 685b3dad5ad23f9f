"""`gigpo_advantages` on hand-computed literals and against the definitions, pair by pair."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.ipa.advantages import gigpo_advantages

advantages = jax.jit(gigpo_advantages, static_argnums=6)

# One task, two episodes: a success of 3 chunks and a failure of 2, both from state 7; state 8 is
# visited once by each.
REWARDS = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 55.0]])
CHUNKS = np.array([3, 2])
STATES = np.array([[7, 8, 9], [7, 8, 7]])


def test_literal_without_scale():
  got = advantages(REWARDS, CHUNKS, np.zeros(2, int), STATES, 0.5, 2.0, "none")
  # A_E = (0.5, -0.5). Step returns (0.25, 0.5, 1) and (0, 0): state 7 has mean 0.125, state 8 0.25,
  # and state 9 one member.
  expected = [[0.5 + 2 * 0.125, 0.5 + 2 * 0.25, 0.5], [-0.5 - 2 * 0.125, -0.5 - 2 * 0.25, 0.0]]
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_literal_with_scale():
  """Two members differ by their deviation on either side; one alone, or all equal, is no signal."""
  got = advantages(REWARDS, CHUNKS, np.zeros(2, int), STATES, 0.5, 2.0, "group")
  np.testing.assert_allclose(got, [[3.0, 3.0, 1.0], [-3.0, -3.0, 0.0]], rtol=1e-6)
  equal = np.tile([[0.1, 0.1, 0.1]], (2, 1))
  got = advantages(
    equal, np.array([3, 3]), np.zeros(2, int), np.tile([[1, 2, 3]], (2, 1)), 0.9, 1.0, "group"
  )
  np.testing.assert_allclose(got, np.zeros((2, 3)), atol=1e-6)


def test_one_trajectory_in_a_state_twice_is_compared_with_itself():
  """A first chunk that led nowhere has the smaller discounted return."""
  states = np.array([[4, 4]])
  got = advantages(np.array([[0.0, 1.0]]), np.array([2]), np.array([0]), states, 0.5, 1.0, "none")
  np.testing.assert_allclose(got, [[-0.25, 0.25]], rtol=1e-6)


def test_without_step_weight_it_is_grpo():
  rewards = np.array([[1.0], [0.0], [0.0], [1.0], [1.0]])
  groups, states = np.array([5, 5, 5, 2, 2]), np.arange(5)[:, None]
  got = advantages(rewards, np.ones(5, int), groups, states, 1.0, 0.0, "group")
  deviation = np.sqrt(2) / 3
  expected = [2 / 3 / deviation, -1 / 3 / deviation, -1 / 3 / deviation, 0, 0]
  np.testing.assert_allclose(got[:, 0], expected, rtol=1e-6)


def reference(rewards, counts, groups, states, gamma, weight, scale):
  """From the definitions, every group gathered by a search over all chunks."""

  def against(value, members):
    deviation = np.std(members) if scale == "group" else 1.0
    return (value - np.mean(members)) / (deviation if deviation > 1e-6 else 1.0)

  n, k = rewards.shape
  real = [(i, t) for i in range(n) for t in range(counts[i])]
  episode = [sum(rewards[i, t] for t in range(counts[i])) for i in range(n)]
  step = {
    (i, t): sum(gamma ** (u - t) * rewards[i, u] for u in range(t, counts[i])) for i, t in real
  }
  out = np.zeros((n, k))
  for i, t in real:
    task = [episode[j] for j in range(n) if groups[j] == groups[i]]
    state = [step[j, u] for j, u in real if groups[j] == groups[i] and states[j, u] == states[i, t]]
    out[i, t] = against(episode[i], task) + weight * against(step[i, t], state)
  return out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["none", "group"]))
def test_agrees_with_the_definitions(seed, scale):
  """With garbage beyond num_chunks, episodes without chunks, and ids of any sign and order."""
  rng = np.random.default_rng(seed)
  n, k = 7, 4
  rewards = rng.normal(size=(n, k))
  counts = rng.integers(0, k + 1, n)
  groups, states = rng.choice([-3, 0, 40], n), rng.integers(-2, 3, (n, k))
  gamma, weight = rng.uniform(0.3, 1.0), rng.uniform(0.0, 2.0)
  expected = reference(rewards, counts, groups, states, gamma, weight, scale)
  rewards[np.arange(k) >= counts[:, None]] = rng.choice([np.nan, np.inf, 1e30])
  with jax.enable_x64(True):
    got = advantages(rewards, counts, groups, states, gamma, weight, scale)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


def test_bad_arguments():
  with pytest.raises(ValueError, match="scale must be 'none' or 'group', got 'batch'"):
    gigpo_advantages(REWARDS, CHUNKS, np.zeros(2, int), STATES, scale="batch")
  with pytest.raises(AssertionError):
    gigpo_advantages(REWARDS, CHUNKS, np.zeros(2, int), STATES[:, :2])


def test_half_precision_is_widened():
  got = advantages(jnp.asarray(REWARDS, jnp.bfloat16), CHUNKS, np.zeros(2, int), STATES)
  assert got.dtype == jnp.float32
  chex.assert_tree_all_finite(got)
