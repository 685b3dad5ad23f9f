"""`ipa_loss` and `sft_loss` on hand-computed literals, and where their gradients may not flow."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from rome import ipa
from tests.ipa import oracle

SUM = ipa.IPAConfig(gamma=1.0, normaliser="trajectory_sum", mask_upper=float("inf"))


@functools.partial(jax.jit, static_argnums=2)
def evaluate(logp, batch, config):
  """((loss, metrics), gradient)."""
  return jax.value_and_grad(ipa.ipa_loss, has_aux=True)(logp, batch, config)


def grad_of(logp, batch, config):
  return np.asarray(evaluate(logp, batch, config)[1])


def two_trajectories():
  """A success of chunks (-1, -2), (-3) and a failure (-4, -5) whose ratio is e^-0.3; IL apart."""
  chunks = [
    oracle.chunk_of([-1.0, -2.0], ret=0.5, trajectory=0),
    oracle.chunk_of([-3.0], ret=1.0, trajectory=0),
    oracle.chunk_of([-4.0, -5.0], old=[-3.6, -4.8], ret=-1.0, positive=False, trajectory=1),
  ]
  return oracle.pack(chunks, [[0, 1], [2]], 6, 2, garbage=3.0)


class LiteralsTest(chex.TestCase):
  # Chunk sums of log-probs are -3, -3, -9; weights times returns 0.5, 1, -0.740818.
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.named_parameters(
    ("token_mean", "token_mean", (1.5 + 3 - 0.740818 * 9) / 5),
    ("trajectory_sum", "trajectory_sum", (1.5 + 3 - 0.740818 * 9) / 2),
    ("chunk_mean", "chunk_mean", (1.5 / 2 + 3 - 0.740818 * 9 / 2) / 3),
    ("trajectory_mean", "trajectory_mean", ((1.5 + 3) / 3 - 0.740818 * 9 / 2) / 2),
  )
  def test_loss(self, normaliser, expected):
    logp, batch, _ = two_trajectories()
    config = dataclasses.replace(SUM, normaliser=normaliser)
    loss, metrics = self.variant(lambda x, b: ipa.ipa_loss(x, b, config))(logp, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    counts = {name: float(metrics[name]) for name in ("tokens", "il_tokens", "chunks")}
    assert counts == {"tokens": 5, "il_tokens": 0, "chunks": 3}
    assert float(metrics["masked_share"]) == float(metrics["truncated_share"]) == 0
    np.testing.assert_allclose(metrics["positive_share"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["ratio_mean"], (2 + 0.740818) / 3, rtol=1e-6)
    assert float(metrics["mismatch_max"]) == 0  # mu = pi_old in this batch

  def test_gradient_is_minus_equation_9(self):
    logp, batch, where = two_trajectories()
    grad = grad_of(logp, batch, SUM)
    for i, expected in enumerate([-0.5 / 2, -1.0 / 2, 0.740818 / 2]):
      np.testing.assert_allclose(grad[where[i]], expected, rtol=1e-6)
    np.testing.assert_array_equal(grad[batch.chunk_ids < 0], 0)

  @pytest.mark.slow
  def test_a_mismatch_drops_the_whole_chunk_and_still_counts(self):
    """20 tokens, one with pi_old/mu = e^2: kept whole at H = 2, dropped whole at H = 1.1."""
    behavior = [-3.0] + [-1.0] * 19
    odd = oracle.chunk_of([-1.0] * 20, behavior=behavior, trajectory=0)
    plain = oracle.chunk_of([-1.0] * 20, trajectory=1)
    logp, batch, where = oracle.pack([odd, plain], [[0, 1]], 42, 2)
    for upper, kept in ((2.0, 1.0), (1.1, 0.0)):
      config = ipa.IPAConfig(mask_upper=upper)
      (_, metrics), grad = evaluate(logp, batch, config)
      np.testing.assert_allclose(grad[where[0]], [-kept / 40] * 20, rtol=1e-6)
      np.testing.assert_allclose(grad[where[1]], [-1 / 40] * 20, rtol=1e-6)
      assert float(metrics["masked_share"]) == (1 - kept) / 2
      np.testing.assert_allclose(metrics["mismatch_mean"], 2 / 40, rtol=1e-6)
      assert float(metrics["mismatch_max"]) == 2.0

  @pytest.mark.slow
  def test_imitation_has_its_own_normaliser_and_needs_no_sampler(self):
    expert = oracle.chunk_of([-1.0, -0.5], behavior=[np.nan] * 2, ret=0.9, il=True, trajectory=0)
    sampled = oracle.chunk_of([-2.0], ret=1.0, trajectory=1)
    logp, batch, where = oracle.pack([expert, sampled], [[0], [1]], 4, 1)
    config = ipa.IPAConfig(lambda_il=0.1, lambda_rl=2.0)
    (loss, metrics), _ = evaluate(logp, batch, config)
    # 0.1 * 0.9 * 1.5 / 2 tokens, and 2 * 1 * 2 / 1 token.
    np.testing.assert_allclose(metrics["loss_il"], 0.0675, rtol=1e-6)
    np.testing.assert_allclose(loss, 4.0675, rtol=1e-6)
    literal = ipa.IPAConfig(il_weight="policy")
    grad = grad_of(logp, batch, literal)
    # The factor pi(c*) = e^-1.5 is a constant: no gradient of its own.
    np.testing.assert_allclose(grad[where[0]], [-0.1 * 0.9 * np.exp(-1.5) / 2] * 2, rtol=1e-6)


class LimitsTest(chex.TestCase):
  """Spec section 11: what the chunk loss becomes for the smallest and the largest chunks."""

  def test_one_token_chunks_weigh_each_token_by_its_own_ratio(self):
    ratios = [0.4, -0.9, -0.2]
    chunks = [oracle.chunk_of([-1 + r], old=[-1.0], ret=-1.0, positive=False) for r in ratios]
    logp, batch, _ = oracle.pack(chunks, [[0, 1, 2]], 3, 3, gap=0)
    np.testing.assert_allclose(grad_of(logp, batch, SUM), [[1.0, 0.4066, 0.8187]], atol=5e-5)

  def test_one_chunk_a_trajectory_is_equation_5(self):
    """Failures carry the truncated ratio of the whole trajectory, successes none."""
    old = [-1.4, -0.1, -0.8]
    fail = oracle.chunk_of([-1.0] * 3, old=old, ret=-1.0, positive=False, trajectory=0)
    win = oracle.chunk_of([-1.0] * 3, old=old, trajectory=1)
    logp, batch, where = oracle.pack([fail, win], [[0], [1]], 4, 1)
    grad = grad_of(logp, batch, SUM) * 2  # two trajectories
    np.testing.assert_allclose(grad[where[0]], [0.7919] * 3, atol=5e-5)  # e^(-0.7/3)
    np.testing.assert_array_equal(grad[where[1]], [-1.0] * 3)

  def test_positives_do_not_see_old_or_engine_log_probs(self):
    rng = np.random.default_rng(0)
    base = -rng.exponential(1.0, (3, 5))
    results = []
    for shift in (0.0, 0.2):
      chunks = [
        oracle.chunk_of(x, old=x + shift, behavior=x - shift, ret=0.7, trajectory=i)
        for i, x in enumerate(base)
      ]
      logp, batch, _ = oracle.pack(chunks, [[0, 1], [2]], 12, 2)
      (loss, _), grad = evaluate(logp, batch, SUM)
      results.append((loss, grad))
    chex.assert_trees_all_equal(*results)

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  @pytest.mark.slow
  def test_on_policy_ratios_are_exactly_one(self, dtype):
    """For each way to say it: old_logp absent, or the same array, or it as float32."""
    rng = np.random.default_rng(0)
    logp = jnp.asarray(-rng.exponential(3.0, (4, 256)), dtype)
    ids = jnp.asarray(rng.integers(-1, 6, (4, 256)))
    zeros = jnp.zeros((4, 256), jnp.int32)
    slots = jnp.zeros((4, 6), jnp.int32)
    batch = ipa.ChunkBatch(
      tokens=zeros,
      segment_ids=zeros,
      positions=zeros,
      chunk_ids=ids,
      old_logp=None,
      behavior_logp=logp,
      returns=jnp.full((4, 6), -1.0),
      positive=slots > 0,
      il_mask=slots > 0,
      trajectory_ids=slots + jnp.arange(4)[:, None],
      group_ids=slots,
      versions=slots,
    )
    for old in (None, logp, logp.astype(jnp.float32)):
      on_policy = dataclasses.replace(batch, old_logp=old)
      (loss, metrics), grad = evaluate(logp, on_policy, ipa.IPAConfig())
      assert float(metrics["ratio_mean"]) == 1.0
      assert float(metrics["truncated_share"]) == float(metrics["masked_share"]) == 0.0
      assert loss.dtype == jnp.float32
      # Every weight is 1 and every return -1: each sampled token pulls by exactly 1/Z.
      pull = (1 / metrics["tokens"]).astype(dtype)
      assert set(np.unique(grad.astype(jnp.float32))) == {0.0, float(pull)}


class SafetyTest(chex.TestCase):
  def test_gradient_flows_through_the_log_probs_only(self):
    """Old and engine log-probs and returns get exact zeros, though all of them weigh the loss."""
    logp, batch, _ = two_trajectories()
    fields = (batch.old_logp, batch.behavior_logp, batch.returns)

    @jax.jit
    def loss(fields):
      old, behavior, returns = fields
      moved = dataclasses.replace(batch, old_logp=old, behavior_logp=behavior, returns=returns)
      return ipa.ipa_loss(logp, moved, ipa.IPAConfig())[0]

    for grad in jax.grad(loss)(fields):
      np.testing.assert_array_equal(grad, 0)
    assert float(loss((batch.old_logp, batch.behavior_logp, 2 * batch.returns))) != float(
      loss(fields)
    )

  @parameterized.parameters(0.0, 1e38, -1e38, np.nan, np.inf, -np.inf)
  @pytest.mark.slow
  def test_what_lies_outside_chunks_is_never_read(self, garbage):
    chunks = [oracle.chunk_of([-1.0, -2.0], ret=0.5), oracle.chunk_of([-3.0], ret=-1.0)]
    for normaliser in ipa.NORMALISERS:
      config = ipa.IPAConfig(normaliser=normaliser)
      results = []
      for filler in (0.5, garbage):
        logp, batch, _ = oracle.pack(chunks, [[0], [1], []], 5, 3, garbage=filler)
        results.append(evaluate(logp, batch, config))
      chex.assert_tree_all_finite(results[1])
      chex.assert_trees_all_equal(*results)
      assert (results[1][1][batch.chunk_ids < 0] == 0).all()

  @parameterized.parameters(*ipa.NORMALISERS)
  def test_an_empty_batch_costs_nothing(self, normaliser):
    config = ipa.IPAConfig(normaliser=normaliser)
    logp, batch, _ = oracle.pack([], [[], [], []], 5, 3, garbage=np.nan)
    (loss, metrics), grad = evaluate(logp, batch, config)
    assert float(loss) == 0
    assert all(float(value) == 0 for value in metrics.values())
    np.testing.assert_array_equal(grad, 0)

  def test_shapes_are_checked(self):
    logp, batch, _ = two_trajectories()
    with self.assertRaises(AssertionError):
      ipa.ipa_loss(logp[:, :-1], batch, ipa.IPAConfig())
    with self.assertRaises(AssertionError):
      ipa.ipa_loss(logp, dataclasses.replace(batch, returns=batch.returns[0]), ipa.IPAConfig())


class SftLossTest(chex.TestCase):
  IDS = jnp.array([[0, 0, -1, 1], [-1, -1, 0, -1]])
  LOGP = jnp.array([[-1.0, -2.0, jnp.nan, -4.0], [jnp.inf, -jnp.inf, -8.0, jnp.nan]])

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.named_parameters(
    ("all", [[True, True], [True, True]], 15.0, 4.0),
    ("one_turn_out", [[False, True], [True, True]], 12.0, 2.0),
    ("weights", [[0.5, 0.0], [2.0, 9.0]], 17.5, 3.0),
    ("none", [[False, False], [False, False]], 0.0, 0.0),
  )
  def test_equation_1(self, mask, total, weight):
    got = self.variant(ipa.sft_loss)(self.LOGP, self.IDS, jnp.array(mask))
    np.testing.assert_array_equal(got, (total, weight))

  def test_gradient(self):
    mask = jnp.array([[0.5, 0.0], [2.0, 9.0]])
    grad = jax.grad(lambda x, m: ipa.sft_loss(x, self.IDS, m)[0], argnums=(0, 1))(self.LOGP, mask)
    np.testing.assert_array_equal(grad[0], [[-0.5, -0.5, 0, 0], [0, 0, -2, 0]])
    np.testing.assert_array_equal(grad[1], jnp.zeros((2, 2)))


@pytest.mark.slow
def test_scoring_one_batch_under_many_policies_by_vmap():
  logp, batch, _ = two_trajectories()
  config = ipa.IPAConfig(normaliser="trajectory_mean")
  many = jnp.stack([logp, logp - 0.25])
  together = jax.jit(jax.vmap(lambda x: ipa.ipa_loss(x, batch, config)[0]))(many)
  alone = [evaluate(x, batch, config)[0][0] for x in many]
  np.testing.assert_allclose(together, alone, rtol=1e-6)
