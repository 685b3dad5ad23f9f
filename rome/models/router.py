"""The router: which experts each token visits, with which weight, and how evenly.

All of it is float32, whatever the model computes in.
"""

import chex
import jax
import jax.numpy as jnp

# What a sparse layer reports: see `router_stats`.
Stats = dict[str, chex.Array]


def route(
  logits_NxE: chex.Array, num_chosen: int, normalise: bool, choices_NxK: chex.Array | None = None
) -> tuple[chex.Array, chex.Array]:
  """Chooses experts for each token, or weighs experts chosen earlier.

  Args:
    logits_NxE: [N, E] float32 router logits.
    num_chosen: static int K, experts a token.
    normalise: whether the chosen weights are scaled to sum to 1 (`norm_topk_prob`).
    choices_NxK: [N, K] int32 recorded choices to follow instead of the best K ("router replay"):
      the weights are still this router's, and carry its gradient.
  Returns:
    weights [N, K] float32 and expert ids [N, K] int32, best first where chosen here.
  """
  chex.assert_rank(logits_NxE, 2)
  probs_NxE = jax.nn.softmax(logits_NxE, axis=-1)
  if choices_NxK is None:
    weights, experts = jax.lax.top_k(probs_NxE, num_chosen)
  else:
    chex.assert_shape(choices_NxK, (logits_NxE.shape[0], num_chosen))
    experts = choices_NxK
    weights = jnp.take_along_axis(probs_NxE, experts, axis=-1)
  if normalise:
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
  return weights, experts


def router_stats(logits_NxE: chex.Array, experts_NxK: chex.Array, real_N: chex.Array) -> Stats:
  """Sums over tokens from which balance is judged; padding does not count.

  Sums, not means, so that micro-batches and shards add up; `rome.models.balance` divides.

  Args:
    logits_NxE: [N, E] float32 router logits.
    experts_NxK: [N, K] int32.
    real_N: [N] bool, False for padding.
  Returns:
    `load` [E]: token copies an expert got; `prob` [E]: sum of router probabilities;
    `z` []: sum of squared log-partition functions; `choices` [N, K] int32.
  """
  # Apart from the layer, whose bits must not depend on whether anybody wants the statistics.
  logits_NxE, experts_NxK = jax.lax.optimization_barrier((logits_NxE, experts_NxK))
  real = real_N.astype(jnp.float32)
  one_hot = jax.nn.one_hot(experts_NxK, logits_NxE.shape[-1], dtype=jnp.float32)
  return {
    "load": jnp.einsum("nke,n->e", one_hot, real),
    "prob": real @ jax.nn.softmax(logits_NxE, axis=-1),
    "z": real @ jnp.square(jax.nn.logsumexp(logits_NxE, axis=-1)),
    "choices": experts_NxK,
  }
