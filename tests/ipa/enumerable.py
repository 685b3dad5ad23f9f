"""Environments small enough to list every trajectory, and tabular softmax policies on them.

An expectation is then a finite sum: no sampling error is left to hide a bias in. Gradients are
taken twice, by jax through `ipa_loss` and by hand from the table (`chunk_scores`, `enumerated`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rome import ipa


@dataclasses.dataclass(frozen=True, eq=False)  # hashed as itself, for jit
class Task:
  """Every trajectory of an environment: M trajectories, K chunks at most, T tokens at most.

  A row is the trajectory's tokens: chunks, with a state-dependent number of observation tokens in
  front of each. Those have chunk id -1 and context 0, so what a loss wrongly read of them would
  move the first context's logits.

  Attributes:
    contexts: int [M, T], what the policy conditions a token on: the state and the chunk so far.
    tokens: int [M, T].
    chunk_ids: int [M, T], -1 outside chunks.
    rewards: float [M, K], as the environment gave them, 0 beyond num_chunks.
    num_chunks: int [M].
    states: int [M, K], the state in front of each chunk, -1 beyond num_chunks.
    chances: float [M], probability of the environment's own draws.
    table: shape of the policy's logits, (contexts, vocabulary).
  """

  contexts: np.ndarray
  tokens: np.ndarray
  chunk_ids: np.ndarray
  rewards: np.ndarray
  num_chunks: np.ndarray
  states: np.ndarray
  chances: np.ndarray
  table: tuple[int, int]

  def lengths(self):
    """int [M, K], tokens of each chunk."""
    slots = np.arange(self.rewards.shape[1])
    return (self.chunk_ids[:, :, None] == slots).sum(axis=1)


# (state, chunk, turn) -> [(probability, next state or None at the end, reward)]
Step = Callable[[int, tuple[int, ...], int], list[tuple[float, int | None, float]]]


def listed(chunks: tuple[tuple[int, ...], ...], step: Step, num_states: int) -> Task:
  """Lists the trajectories of an environment that starts in state 0 and must end by itself.

  Args:
    chunks: every string that the policy may emit between two observations, a prefix-free code that
      is complete, so that a policy over tokens is one over chunks.
    step: the environment.
    num_states: states are 0..num_states-1.
  """
  prefixes = sorted({chunk[:i] for chunk in chunks for i in range(len(chunk))})
  vocabulary = 1 + max(map(max, chunks))
  found = []

  def extend(state, past, chance):
    for chunk in chunks:
      for probability, after, reward in step(state, chunk, len(past)):
        now = [*past, (state, chunk, reward)]
        if after is None:
          found.append((chance * probability, now))
        else:
          extend(after, now, chance * probability)

  extend(0, [], 1.0)
  num_chunks = np.array([len(turns) for _, turns in found])
  width = max(sum(state + len(chunk) for state, chunk, _ in turns) for _, turns in found)
  shape, slots = (len(found), width), (len(found), num_chunks.max())
  contexts, tokens = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  chunk_ids, states = np.full(shape, -1, np.int32), np.full(slots, -1, np.int32)
  rewards = np.zeros(slots)
  for row, (_, turns) in enumerate(found):
    at = 0
    for k, (state, chunk, reward) in enumerate(turns):
      at += state  # observation tokens
      for i, token in enumerate(chunk):
        contexts[row, at + i] = state * len(prefixes) + prefixes.index(chunk[:i])
        tokens[row, at + i], chunk_ids[row, at + i] = token, k
      at += len(chunk)
      rewards[row, k], states[row, k] = reward, state
  chances = np.array([chance for chance, _ in found])
  table = (num_states * len(prefixes), vocabulary)
  return Task(contexts, tokens, chunk_ids, rewards, num_chunks, states, chances, table)


def search_task(turns: int, step_reward: float = 0.0) -> Task:
  """Look, think or submit: chunks of one and two tokens, episodes of 1..turns chunks.

  Tokens: 0 looks, 1 thinks (then a second token says what to do), 2 submits, which ends the
  episode. Looking may fail by chance, so the observation depends on action and luck. Submitting
  pays in state 1, and in state 2 half if thought through; looking after a thought pays
  `step_reward` at once.
  """
  chunks = ((0,), (2,), (1, 0), (1, 1), (1, 2))

  def step(state, chunk, turn):
    reward = step_reward if chunk == (1, 0) else 0.0
    if chunk[-1] == 2:
      return [(1.0, None, (0.0, 1.0, 0.5 * (len(chunk) == 2))[state])]
    if turn == turns - 1:
      return [(1.0, None, reward)]
    if chunk == (0,):
      return [(0.75, (state + 1) % 3, 0.0), (0.25, state, 0.0)]
    return [(1.0, 2 if chunk == (1, 0) else (state + 2) % 3, reward)]

  return listed(chunks, step, 3)


def stopping_bandit(pay: tuple[float, ...]) -> Task:
  """Token 0 stops, token 1 goes on: pay[t] for stopping at turn t, pay[-1] for never stopping.

  Its state is the turn, so each turn has logits of its own and one-token chunks.
  """
  turns = len(pay) - 1

  def step(state, chunk, turn):
    if chunk == (0,):
      return [(1.0, None, pay[turn])]
    return [(1.0, None, pay[turns])] if turn == turns - 1 else [(1.0, turn + 1, 0.0)]

  return listed(((0,), (1,)), step, turns)


def policy(task: Task, seed: int, scale: float = 0.7) -> np.ndarray:
  """Logits [contexts, vocabulary] drawn at random."""
  return scale * np.random.default_rng(seed).normal(size=task.table)


def token_logp(task: Task, logits) -> jax.Array:
  """Log-probs [M, T] under a table of logits; those of observation tokens mean nothing."""
  return jax.nn.log_softmax(logits)[task.contexts, task.tokens]


def entropies(logits) -> jax.Array:
  """Entropy of every context's distribution: [contexts]."""
  logp = jax.nn.log_softmax(logits)
  return -(jnp.exp(logp) * logp).sum(axis=1)


def probabilities(task: Task, logits) -> jax.Array:
  """Probability [M] of every trajectory."""
  logp = jnp.where(task.chunk_ids >= 0, token_logp(task, logits), 0)
  return task.chances * jnp.exp(logp.sum(axis=1))


def true_gradient(task: Task, logits, outcome_M) -> np.ndarray:
  """Gradient of the expected outcome by jax.grad; outcome_M is each trajectory's, held fixed."""
  return np.asarray(jax.grad(lambda x: probabilities(task, x) @ outcome_M)(jnp.asarray(logits)))


def visits(task: Task, logits) -> jax.Array:
  """Expected number of tokens sampled in each context: [contexts]."""
  at_MxTxC = (task.contexts[:, :, None] == np.arange(task.table[0])) & (
    task.chunk_ids[:, :, None] >= 0
  )
  return probabilities(task, logits) @ at_MxTxC.sum(axis=1)


def token_scores(task: Task, logits) -> np.ndarray:
  """d log pi(token) / d logits, [M, T, contexts, vocabulary], by hand: one-hot minus softmax."""
  softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  scores = np.zeros((*task.tokens.shape, *task.table))
  for row, at in zip(*np.nonzero(task.chunk_ids >= 0), strict=True):
    context = task.contexts[row, at]
    scores[row, at, context] = -softmax[context]
    scores[row, at, context, task.tokens[row, at]] += 1
  return scores


def chunk_scores(task: Task, logits) -> np.ndarray:
  """d log pi(chunk) / d logits, [M, K, contexts, vocabulary]."""
  in_chunk = task.chunk_ids[:, :, None] == np.arange(task.rewards.shape[1])
  return np.einsum("mtcv,mtk->mkcv", token_scores(task, logits), in_chunk.astype(float))


def batches(task: Task, size: int) -> np.ndarray:
  """Every batch of `size` trajectories drawn with replacement: indices [S, size]."""
  return np.array(list(itertools.product(range(len(task.tokens)), repeat=size)))


def batch_probabilities(task: Task, logits, indices_SxN) -> np.ndarray:
  """Probability [S] of every batch of independent trajectories."""
  return np.asarray(probabilities(task, logits))[indices_SxN].prod(axis=1)


def enumerated(task: Task, logits, weight_S, indices_SxN, coefficients_SxNxK) -> np.ndarray:
  """sum_S weight_S sum_{n,k} coefficient d log pi(chunk): an expected gradient by hand."""
  per_trajectory = np.zeros(task.rewards.shape)
  np.add.at(per_trajectory, indices_SxN, weight_S[:, None, None] * coefficients_SxNxK)
  return np.einsum("mk,mkcv->cv", per_trajectory, chunk_scores(task, logits))


def expected_update(task, logits, config, indices_SxN, weight_S, old=None, behavior=None, **given):
  """The expectation of minus the gradient of `ipa_loss`: what an update climbs on average.

  Args:
    task, logits: the environment and the table that is differentiated.
    config: IPAConfig, for the loss and for `shaped_returns`.
    indices_SxN, weight_S: the batches and the probability of each.
    old, behavior: tables of pi_old and mu; None: on-policy, and mu = pi_old.
    given: returns=[S, N, K] in place of those of `shaped_returns` (one group a batch); ref_logp
      [M, T].
  """
  old_logp = None if old is None else token_logp(task, old)
  engine = token_logp(task, next(x for x in (behavior, old, logits) if x is not None))
  returns, positive = _shaped(config, task.rewards[indices_SxN], task.num_chunks[indices_SxN])
  returns, ref_logp = given.pop("returns", returns), given.pop("ref_logp", None)
  assert not given, given
  logps = (old_logp, engine, ref_logp)
  return np.asarray(_update(task, config, logits, indices_SxN, weight_S, returns, positive, logps))


@functools.partial(jax.jit, static_argnums=0)
def _shaped(config, rewards_SxNxK, num_chunks_SxN):
  group_ids_N = jnp.zeros(num_chunks_SxN.shape[1], jnp.int32)
  shape = lambda rewards, counts: ipa.shaped_returns(rewards, counts, 0, config, group_ids_N)  # noqa: E731
  return jax.vmap(shape)(rewards_SxNxK, num_chunks_SxN)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(task, config, logits, indices_SxN, weight_S, returns_SxNxK, positive_SxN, logps):
  tokens, chunk_ids = jnp.asarray(task.tokens), jnp.asarray(task.chunk_ids)

  def loss(logp_MxT, entropy_MxT, rows_N, returns_NxK, positive_N):
    old, engine, ref = jax.tree.map(lambda x: x[rows_N], logps)
    slots = jnp.zeros(returns_NxK.shape, jnp.int32)
    batch = ipa.ChunkBatch(
      tokens=tokens[rows_N],
      segment_ids=jnp.ones_like(tokens[rows_N]),
      positions=jnp.zeros_like(tokens[rows_N]),
      chunk_ids=chunk_ids[rows_N],
      old_logp=old,
      behavior_logp=engine,
      returns=returns_NxK,
      positive=(slots == 0) & positive_N[:, None],
      il_mask=slots > 0,
      trajectory_ids=slots + jnp.arange(len(rows_N), dtype=jnp.int32)[:, None],
      group_ids=slots,
      versions=slots,
      ref_logp=ref,
    )
    return ipa.ipa_loss(logp_MxT[rows_N], batch, config, entropy_BxT=entropy_MxT[rows_N])[0]

  def expected_loss(logits):
    logp_MxT, entropy_MxT = token_logp(task, logits), entropies(logits)[task.contexts]
    each = jax.vmap(loss, in_axes=(None, None, 0, 0, 0))
    return weight_S @ each(logp_MxT, entropy_MxT, indices_SxN, returns_SxNxK, positive_SxN)

  return -jax.grad(expected_loss)(logits)
