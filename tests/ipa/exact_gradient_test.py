"""The expectation of `ipa_loss`'s gradient, with every trajectory and every batch listed.

Where the method is unbiased it equals jax.grad of the true expected return, to 1e-8 in float64.
Where it is not, it equals a formula summed by hand from the policy's table, and the size of the
bias on these environments is pinned: |update - truth| / |truth|, and the angle between the two.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome import ipa
from rome.ipa import branching
from tests.ipa import enumerable

pytestmark = pytest.mark.slow

EXACT = ipa.IPAConfig(gamma=1.0, normaliser="trajectory_sum", mask_upper=math.inf)

# Sparse rewards; and with a cost at each look after a thought, so that returns-to-go differ.
TASKS = {"sparse": enumerable.search_task(3), "dense": enumerable.search_task(3, -0.25)}
SHORT = enumerable.search_task(2, -0.25)
# All logits 0, so that each turn stops with probability 1/2. By hand: values of going on are 3,
# 3/2, 3/2 from the last turn to the first, of stopping 2, 0, 1, and turns are reached with 1/4,
# 1/2, 1: the gradient of a turn's logit of going on is reached/4 (go - stop).
BANDIT = enumerable.stopping_bandit((1.0, 0.0, 2.0, 4.0))
BANDIT_TRUTH = np.array([1, 3, 1]) / 8

both_tasks = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def assert_equal(got, expected):
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-8)


def assert_biased(got, truth, size, degrees):
  """Checks |got - truth| / |truth| and the angle between them against measured literals."""
  cosine = (got * truth).sum() / np.linalg.norm(got) / np.linalg.norm(truth)
  measured = (np.linalg.norm(got - truth) / np.linalg.norm(truth), math.degrees(math.acos(cosine)))
  np.testing.assert_allclose(measured, (size, degrees), rtol=0, atol=6e-3)


def update(task, logits, config, size=1, **given):
  """The expected update over batches of `size` trajectories sampled from mu."""
  sampler = next(x for x in (given.get("behavior"), given.get("old"), logits) if x is not None)
  indices = enumerable.batches(task, size)
  weight = enumerable.batch_probabilities(task, sampler, indices)
  return enumerable.expected_update(task, logits, config, indices, weight, **given)


def by_hand(task, logits, coefficients, sampler=None):
  """sum_m p_m sum_k coefficient d log pi(c_k), coefficients [M, K]."""
  everything = enumerable.batches(task, 1)
  weight = enumerable.batch_probabilities(task, logits if sampler is None else sampler, everything)
  return enumerable.enumerated(task, logits, weight, everything, coefficients[:, None])


def returns_of(task, gamma=1.0):
  """Discounted returns [M, K] by the double sum, 0 beyond num_chunks."""
  slots = np.arange(task.rewards.shape[1])
  power = slots[None, :] - slots[:, None]
  discount = np.where(power >= 0, gamma ** np.maximum(power, 0.0), 0.0)
  real = slots < task.num_chunks[:, None]
  return np.where(real, np.einsum("mj,kj->mk", task.rewards, discount), 0.0)


def chunk_means(task, values_MxT):
  """Mean over each chunk's tokens: [M, K]."""
  slots = np.arange(task.rewards.shape[1])
  in_chunk = task.chunk_ids[:, :, None] == slots
  sums = np.where(in_chunk, np.asarray(values_MxT)[:, :, None], 0.0).sum(axis=1)
  return sums / np.maximum(task.lengths(), 1)


def go(gradient):
  """The bandit's gradient of the three logits of going on; those of stopping are minus it."""
  assert_equal(gradient.sum(axis=1), 0.0)
  return gradient[:, 1]


@both_tasks
def test_the_lists_are_complete_and_cover_what_they_claim(task):
  logits = enumerable.policy(task, 0)
  assert_equal(enumerable.probabilities(task, logits).sum(), 1.0)
  assert set(task.num_chunks) == {1, 2, 3} and set(task.lengths().ravel()) == {0, 1, 2}
  total = task.rewards.sum(axis=1)
  assert (total > 0).any() and (total <= 0).any()
  observations = (task.chunk_ids < 0) & (np.arange(task.tokens.shape[1]) < 3)
  assert observations.any()
  assert_equal(by_hand(task, logits, np.ones(task.rewards.shape)), 0.0)
  assert_equal(
    by_hand(task, logits, np.where(task.lengths() > 0, total[:, None], 0.0)),
    enumerable.true_gradient(task, logits, total),
  )


class TestOnPolicy:
  @both_tasks
  @pytest.mark.parametrize("size", [1, 2])
  @pytest.mark.parametrize("failure_reward", [0.0, -1.0])
  def test_trajectory_sum_is_the_gradient_of_the_return(self, task, size, failure_reward):
    logits = enumerable.policy(task, 0)
    total = task.rewards.sum(axis=1)
    shaped = total + np.where(total > 0, 0.0, failure_reward)
    config = dataclasses.replace(EXACT, failure_reward=failure_reward)
    truth = enumerable.true_gradient(task, logits, shaped)
    assert np.abs(truth).max() > 0.01
    assert_equal(update(task, logits, config, size), truth)

  @both_tasks
  def test_weighing_negatives_is_exact_only_where_rewards_are_sparse(self, task):
    """The weight hangs on the outcome: rewards before a chunk no longer drop out of its mean."""
    logits = enumerable.policy(task, 0)
    total = task.rewards.sum(axis=1)
    shaped = np.where(total > 0, total, 0.25 * (total - 1.0))
    truth = enumerable.true_gradient(task, logits, shaped)
    config = dataclasses.replace(EXACT, failure_reward=-1.0, negative_weight=0.25)
    got = update(task, logits, config)
    if task is TASKS["sparse"]:
      assert_equal(got, truth)
    else:
      assert_biased(got, truth, 0.04, 1.91)

  @pytest.mark.parametrize(
    ("name", "bias"), [("sparse", (0.10, 4.06)), ("dense", (0.09, 4.07))], ids=TASKS
  )
  def test_discounting_follows_the_chunk_discounted_formula(self, name, bias):
    """E sum_k G_k d log pi(c_k) with the G_k of Eq. 7.

    Neither the gradient of the return nor that of the discounted return, whose chunk k weighs
    gamma^k times as much.
    """
    task, gamma = TASKS[name], 0.9
    logits = enumerable.policy(task, 0)
    got = update(task, logits, dataclasses.replace(EXACT, gamma=gamma))
    assert_equal(got, by_hand(task, logits, returns_of(task, gamma)))
    truth = enumerable.true_gradient(task, logits, task.rewards.sum(axis=1))
    assert_equal(got - truth, by_hand(task, logits, returns_of(task, gamma) - returns_of(task)))
    assert_biased(got, truth, *bias)

    from_start = gamma ** np.arange(3)
    discounted = enumerable.true_gradient(task, logits, task.rewards @ from_start)
    assert_equal(by_hand(task, logits, returns_of(task, gamma) * from_start), discounted)
    assert np.abs(got - discounted).max() > 1e-3


class TestOffPolicy:
  CONFIG = dataclasses.replace(EXACT, failure_reward=-1.0)

  def pieces(self, shift):
    task = TASKS["dense"]
    logits = enumerable.policy(task, 0)
    old = logits + shift * enumerable.policy(task, 1)
    total = task.rewards.sum(axis=1)
    positive = (total > 0)[:, None]
    failure = np.where(positive, 0.0, -1.0)
    shaped = np.where(task.lengths() > 0, returns_of(task) + failure, 0.0)
    truth = enumerable.true_gradient(task, logits, np.where(total > 0, total, total - 1.0))
    return task, logits, old, positive, shaped, truth

  @pytest.mark.parametrize("size", [1, 2])
  def test_positives_carry_no_ratio_and_negatives_a_truncated_one(self, size):
    task, logits, old, positive, shaped, truth = self.pieces(1.0)
    difference = enumerable.token_logp(task, logits) - enumerable.token_logp(task, old)
    ratio = np.exp(chunk_means(task, difference))
    assert 0.2 < (ratio > 1)[~positive[:, 0]].mean() < 0.8
    weight = np.where(positive, 1.0, np.minimum(ratio, 1.0))
    got = update(task, logits, self.CONFIG, size, old=old)
    assert_equal(got, by_hand(task, logits, weight * shaped, sampler=old))
    assert_biased(got, truth, 0.32, 15.97)
    # What is left of the bias with either half undone, by whole-trajectory ratios, which are exact.
    whole = np.exp(np.where(task.chunk_ids >= 0, difference, 0.0).sum(axis=1))[:, None]
    assert_equal(by_hand(task, logits, whole * shaped, sampler=old), truth)
    positives = by_hand(task, logits, np.where(positive, 1.0, whole) * shaped, sampler=old)
    negatives = by_hand(task, logits, np.where(positive, whole, weight) * shaped, sampler=old)
    assert_biased(positives, truth, 0.16, 6.40)
    assert_biased(negatives, truth, 0.36, 20.20)
    assert_equal(got - truth, (positives - truth) + (negatives - truth))

  def test_at_the_old_policy_nothing_is_lost(self):
    task, logits, _, _, _, truth = self.pieces(0.0)
    assert_equal(update(task, logits, self.CONFIG, old=logits), truth)

  def test_a_mask_leaves_out_what_the_engine_made_too_rare(self):
    task, logits, engine, _, shaped, truth = self.pieces(1.0)
    difference = enumerable.token_logp(task, logits) - enumerable.token_logp(task, engine)
    kept = chunk_means(task, difference) <= math.log(1.2)
    share = (~kept)[task.lengths() > 0].mean()
    assert 0.1 < share < 0.9
    config = dataclasses.replace(self.CONFIG, mask_upper=1.2)
    got = update(task, logits, config, behavior=engine)
    assert_equal(got, by_hand(task, logits, kept * shaped, sampler=engine))
    assert_biased(got, truth, 0.67, 33.63)
    # Without a mask an engine's mismatch is a bias too, as the loss has no ratio to mu.
    unmasked = update(task, logits, self.CONFIG, behavior=engine)
    assert_equal(unmasked, by_hand(task, logits, shaped, sampler=engine))
    assert_biased(unmasked, truth, 0.58, 27.66)


class TestNormalisers:
  @pytest.mark.parametrize("size", [1, 2])
  @pytest.mark.parametrize(
    ("normaliser", "sizes"),
    [
      ("token_mean", ((0.65, 10.04), (0.59, 6.48))),
      ("chunk_mean", ((0.63, 17.82), (0.58, 17.75))),
      ("trajectory_mean", ((0.65, 10.04), (0.65, 10.04))),
    ],
  )
  def test_means_are_biased(self, normaliser, sizes, size):
    task = TASKS["dense"]
    logits = enumerable.policy(task, 0)
    indices = enumerable.batches(task, size)
    lengths = task.lengths()[indices]
    tokens = lengths.sum(axis=2, keepdims=True)
    z = {
      "token_mean": tokens.sum(axis=1, keepdims=True),
      "chunk_mean": (lengths > 0).sum(axis=(1, 2), keepdims=True) * np.maximum(lengths, 1),
      "trajectory_mean": size * tokens,
    }[normaliser]
    weight = enumerable.batch_probabilities(task, logits, indices)
    coefficients = returns_of(task)[indices] / z
    got = update(task, logits, dataclasses.replace(EXACT, normaliser=normaliser), size)
    assert_equal(got, enumerable.enumerated(task, logits, weight, indices, coefficients))
    truth = enumerable.true_gradient(task, logits, task.rewards.sum(axis=1))
    assert_biased(got, truth, *sizes[size - 1])


class TestBaselines:
  @pytest.mark.parametrize(("task", "size"), [(TASKS["dense"], 2), (SHORT, 3)], ids=["2", "3"])
  def test_leave_one_out_is_exact_and_a_mean_with_oneself_shrinks(self, task, size):
    logits = enumerable.policy(task, 0)
    truth = enumerable.true_gradient(task, logits, task.rewards.sum(axis=1))
    for centre, factor in (("leave_one_out", 1), ("group", 1 - 1 / size), ("batch", 1 - 1 / size)):
      got = update(task, logits, dataclasses.replace(EXACT, centre=centre), size)
      assert_equal(got, factor * truth)

  def test_dividing_by_a_deviation_tilts_the_gradient(self):
    """The deviation hangs on one's own outcome, so it is no mere scale."""
    task = SHORT
    logits = enumerable.policy(task, 0)
    total = task.rewards.sum(axis=1)
    indices = enumerable.batches(task, 3)
    deviation = total[indices].std(axis=1)[:, None, None]
    deviation = np.where(deviation > 1e-6, deviation, 1.0)
    centred = returns_of(task)[indices] - total[indices].mean(axis=1)[:, None, None]
    coefficients = np.where(task.lengths()[indices] > 0, centred, 0.0) / deviation / 3
    weight = enumerable.batch_probabilities(task, logits, indices)
    config = dataclasses.replace(EXACT, centre="group", scale="group")
    got = update(task, logits, config, 3)
    assert_equal(got, enumerable.enumerated(task, logits, weight, indices, coefficients))
    assert_biased(got, enumerable.true_gradient(task, logits, total), 0.99, 29.43)


class TestStoppingTime:
  """A bandit that decides each turn whether to stop; fractions are worked out by hand."""

  LOGITS = np.zeros((3, 2))

  def of_returns(self, size, coefficients):
    """The update for returns made of a batch's G_k and of which turns it reached, [S, N, K]."""
    indices = enumerable.batches(BANDIT, size)
    weight = enumerable.batch_probabilities(BANDIT, self.LOGITS, indices)
    reached = BANDIT.lengths()[indices]
    given = coefficients(returns_of(BANDIT)[indices], reached) * reached
    return go(
      enumerable.expected_update(BANDIT, self.LOGITS, EXACT, indices, weight, returns=given)
    )

  def of(self, size=1, **settings):
    return go(update(BANDIT, self.LOGITS, dataclasses.replace(EXACT, **settings), size))

  def test_truth(self):
    truth = enumerable.true_gradient(BANDIT, self.LOGITS, BANDIT.rewards.sum(axis=1))
    assert_equal(go(truth), BANDIT_TRUTH)

  @pytest.mark.parametrize("size", [2, 3])
  def test_whole_trajectory_baselines(self, size):
    assert_equal(self.of(size), BANDIT_TRUTH)
    assert_equal(self.of(size, centre="leave_one_out"), BANDIT_TRUTH)
    assert_equal(self.of(size, centre="group"), (1 - 1 / size) * BANDIT_TRUTH)

  @pytest.mark.parametrize("size", [2, 3])
  def test_a_mean_over_those_that_reached_a_turn_fades_with_the_turn(self, size):
    """A turn that q of all reach keeps 1 - E[1/n | reached] = 1 - (1 - (1-q)^N) / (N q)."""
    reached = np.array([1, 1 / 2, 1 / 4])

    def centred(g, here):
      count = here.sum(axis=1, keepdims=True)
      return g - (g * here).sum(axis=1, keepdims=True) / np.maximum(count, 1)

    got = self.of_returns(size, centred)
    factor = 1 - (1 - (1 - reached) ** size) / (size * reached)
    assert_equal(got, factor * BANDIT_TRUTH)
    if size == 2:
      assert_equal(factor, [1 / 2, 1 / 4, 1 / 8])

  @pytest.mark.parametrize("size", [2, 3])
  def test_a_mean_over_the_others_that_reached_a_turn_is_exact(self, size):
    """So it is one's own return in the mean that fades it, and not the turn's index."""

    def centred(g, here):
      others = (g * here).sum(axis=1, keepdims=True) - g * here
      count = here.sum(axis=1, keepdims=True) - here
      return g - others / np.maximum(count, 1)

    assert_equal(self.of_returns(size, centred), BANDIT_TRUTH)

  @pytest.mark.parametrize("size", [2, 3])
  def test_a_normaliser_of_those_that_reached_a_turn_blows_late_turns_up(self, size):
    """Z_k = trajectories that reached turn k: the turn is multiplied by (1 - (1-q)^N) / q."""
    reached = np.array([1, 1 / 2, 1 / 4])

    def per_turn(g, here):
      return size * g / np.maximum(here.sum(axis=1, keepdims=True), 1)

    factor = (1 - (1 - reached) ** size) / reached
    assert_equal(self.of_returns(size, per_turn), factor * BANDIT_TRUTH)
    if size == 2:
      assert_equal(factor, [1, 3 / 2, 7 / 4])

  @pytest.mark.parametrize("normaliser", ["token_mean", "chunk_mean", "trajectory_mean"])
  def test_means_over_an_episode_turn_the_first_decision_around(self, normaliser):
    """Each return is divided by its number of turns: stopping at once looks better than going."""
    assert_equal(self.of(normaliser=normaliser), np.array([-3, 3, 1]) / 24)

  def test_a_discount_prefers_to_stop(self):
    """gamma = 1/2: going on at the first turn is worth 3/8 against 1."""
    assert_equal(self.of(gamma=0.5), [-5 / 32, 3 / 16, 1 / 8])

  def test_a_baseline_that_is_discounted_is_not_neutral(self):
    """gamma^(K-k) b hangs on how long the episode lasts: a baseline above 0 pushes to go on."""
    got = self.of(2, gamma=0.5, centre="leave_one_out")
    bias = 1.25 * np.array([5 / 32, 1 / 16, 0])  # E[b] times what it costs to last
    assert_equal(got, np.array([-5 / 32, 3 / 16, 1 / 8]) + bias)


class TestPenalties:
  """KL and entropy as each context has them, the visits to contexts held as they are.

  The gradient of the KL or entropy of whole trajectories has one term more, for the contexts that a
  token leads to: E sum_t d log pi(a_t) sum_{u > t} (what token u pays).
  """

  def at_fixed_visits(self, task, logits, per_context):
    """Gradient of sum_h sg(visits(h)) per_context(logits)_h, by jax.grad."""
    visits = enumerable.visits(task, logits)
    return np.asarray(jax.grad(lambda x: visits @ per_context(x))(jnp.asarray(logits)))

  def of_trajectories(self, task, logits, ref_logp_MxT):
    """Gradient of E sum_t (log pi_t - log ref_t), and its term for what tokens lead to."""
    pays = np.asarray(enumerable.token_logp(task, logits) - ref_logp_MxT)
    pays = np.where(task.chunk_ids >= 0, pays, 0.0)
    later = pays.sum(axis=1, keepdims=True) - np.cumsum(pays, axis=1)
    probability = np.asarray(enumerable.probabilities(task, logits))
    scores = enumerable.token_scores(task, logits)
    leads_to = np.einsum("m,mt,mtcv->cv", probability, later, scores)
    # What a token pays is held fixed here: its own gradient is a score, of mean 0.
    return enumerable.true_gradient(task, logits, pays.sum(axis=1)), leads_to

  @pytest.mark.parametrize("size", [1, 2])
  def test_kl_is_that_of_each_context(self, size):
    task = TASKS["dense"]
    logits, ref = enumerable.policy(task, 0), enumerable.policy(task, 1)
    ref_logp = enumerable.token_logp(task, ref)
    config = dataclasses.replace(EXACT, kl_weight=0.3)
    got = update(task, logits, config, size, ref_logp=ref_logp) - update(task, logits, EXACT, size)

    def kl(x):
      return (jax.nn.softmax(x) * (jax.nn.log_softmax(x) - jax.nn.log_softmax(ref))).sum(axis=1)

    fixed = self.at_fixed_visits(task, logits, kl)
    assert_equal(got, -0.3 * fixed)
    whole, leads_to = self.of_trajectories(task, logits, ref_logp)
    assert_equal(whole, fixed + leads_to)
    assert_biased(fixed, whole, 0.54, 23.87)

  @pytest.mark.parametrize("size", [1, 2])
  def test_entropy_is_that_of_each_context(self, size):
    task = TASKS["dense"]
    logits = enumerable.policy(task, 0)
    config = dataclasses.replace(EXACT, entropy_weight=0.3)
    got = update(task, logits, config, size) - update(task, logits, EXACT, size)
    fixed = self.at_fixed_visits(task, logits, enumerable.entropies)
    assert_equal(got, 0.3 * fixed)
    whole, leads_to = self.of_trajectories(task, logits, np.zeros(task.tokens.shape))
    assert_equal(-whole, fixed - leads_to)
    assert_biased(fixed, -whole, 0.84, 35.57)

  def test_where_a_token_leads_nowhere_they_are_those_of_trajectories(self):
    task = enumerable.stopping_bandit((1.0, 0.0))
    logits, ref = enumerable.policy(task, 0), enumerable.policy(task, 1)
    ref_logp = enumerable.token_logp(task, ref)
    plain = update(task, logits, EXACT)
    kl = update(task, logits, dataclasses.replace(EXACT, kl_weight=0.3), ref_logp=ref_logp) - plain
    entropy = update(task, logits, dataclasses.replace(EXACT, entropy_weight=0.3)) - plain
    for got, log_ref in ((kl, ref_logp), (entropy, np.zeros(task.tokens.shape))):
      whole, leads_to = self.of_trajectories(task, logits, log_ref)
      assert_equal(leads_to, 0.0)
      assert_equal(got, -0.3 * whole)
      assert np.abs(got).max() > 0.01


def branched(task, logits):
  """Two trajectories that share their first chunk and what came of it: indices [S, 2], weight [S].

  The second is the first, resampled from its second chunk on; an episode of one chunk has nothing
  to resample and comes twice.
  """
  probability = np.asarray(enumerable.probabilities(task, logits))
  starts = {}
  for m in range(len(probability)):
    first = tuple(task.tokens[m][task.chunk_ids[m] == 0])
    start = (first, task.states[m, 1]) if task.num_chunks[m] > 1 else (first, "ended", m)
    starts.setdefault(start, []).append(m)
  pairs = [(a, b) for members in starts.values() for a in members for b in members]
  chance = {m: probability[members].sum() for members in starts.values() for m in members}
  weight = np.array([probability[a] * probability[b] / chance[a] for a, b in pairs])
  return np.array(pairs), weight


class TestBranches:
  def returns(self, task, indices, baseline):
    """Centred from the second chunk on, [S, N, K]; states are known by their index."""
    g = returns_of(task)[indices]
    ids = np.where(task.num_chunks > 1, task.states[:, 1], 3)[indices]
    baselines = jax.vmap(lambda r, i: baseline(r, i, 4))(jnp.asarray(g[..., 1]), jnp.asarray(ids))
    after = (task.lengths()[indices] > 0) & (np.arange(task.rewards.shape[1]) > 0)
    return g, np.asarray(baselines)[:, :, None], after

  @both_tasks
  def test_two_branches_of_one_trunk(self, task):
    logits = enumerable.policy(task, 0)
    truth = enumerable.true_gradient(task, logits, task.rewards.sum(axis=1))
    indices, weight = branched(task, logits)
    assert_equal(weight.sum(), 1.0)
    g, b, after = self.returns(task, indices, branching.branch_baseline)
    of = functools.partial(enumerable.expected_update, task, logits, EXACT, indices, weight)
    assert_equal(of(returns=g - after * b), truth)
    assert np.abs(after * b).max() > 0.1

    # With oneself in the mean, what is after the boundary shrinks by 1 - 1/2.
    itself = g - after * g[..., 1:2].mean(axis=1, keepdims=True)
    assert_equal(of(returns=itself), truth - of(returns=g * after) / 2)
    # Taken from the trunk as well, it leaves the trunk nothing.
    trunk = (np.arange(task.rewards.shape[1]) == 0) & (task.num_chunks > 1)[indices][:, :, None]
    assert_equal(of(returns=trunk * (g[:, :, 1:2] - b)), 0.0)
    assert np.abs(of(returns=trunk * g[:, :, 1:2])).max() > 0.01

  def test_two_trunks_whose_branches_meet_in_a_state(self):
    """Branches of another trunk at the same state are siblings too."""
    task = SHORT
    logits = enumerable.policy(task, 0)
    pairs, weight = branched(task, logits)
    first, second = np.divmod(np.arange(len(pairs) ** 2), len(pairs))
    indices = np.concatenate([pairs[first], pairs[second]], axis=1)
    g, b, after = self.returns(task, indices, branching.branch_baseline)
    shared = np.ptp(task.states[indices, 1], axis=1) == 0
    prefix = task.chunk_ids[indices] == 0
    assert (shared & (prefix[:, 0] != prefix[:, 2]).any(axis=1)).any()
    got = enumerable.expected_update(
      task, logits, EXACT, indices, weight[first] * weight[second], returns=g - after * b
    )
    assert_equal(got, enumerable.true_gradient(task, logits, task.rewards.sum(axis=1)))
