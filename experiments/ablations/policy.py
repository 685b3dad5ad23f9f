"""The policy of the ablations: ROME's decoder with a few thousand weights, and its sampler.

The sampler is another engine than the trainer, as in a real system: it runs on weights rounded to 4
bits. So its log-probs (mu) and the trainer's for the same weights (pi_old) differ.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from experiments.ablations import chain
from rome import models

MODEL = models.ModelConfig(
  vocab_size=len(chain.TEXT),
  hidden_size=32,
  num_hidden_layers=1,
  num_attention_heads=2,
  num_key_value_heads=1,
  head_dim=16,
  num_experts=1,
  num_experts_per_tok=1,
  moe_intermediate_size=64,
)
SAMPLING = models.Sampling()
# What a sampler may keep its weights in; "float32" makes both engines the same.
ENGINES = {"float32": None, "float8_e5m2": jnp.float8_e5m2, "float4_e2m1": jnp.float4_e2m1fn}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
  """Episodes of B chains of H steps, T = 1 + 3 H tokens.

  Attributes:
    tokens: [B, T] int32; what follows the end of an episode is meaningless.
    behavior_logp: [B, T] float32, the sampler's log-prob of each letter that it sampled, else NaN.
    taken: [B, H] bool, the steps whose word was sampled: from the start to the end of the episode.
    played: [B, H] bool, the steps that happened, with those of the prefix.
    success: [B] bool.
  """

  tokens: chex.Array
  behavior_logp: chex.Array
  taken: chex.Array
  played: chex.Array
  success: chex.Array


def sampler_weights(params: chex.ArrayTree, engine: str) -> chex.ArrayTree:
  """The weights as the sampler holds them: matrices rounded, one scale an output; norms kept."""
  dtype = ENGINES[engine]
  if dtype is None:
    return params

  def rounded(x: chex.Array) -> chex.Array:
    if x.ndim < 2:
      return x
    largest = jnp.abs(x).max(axis=tuple(range(x.ndim - 1)), keepdims=True)
    scale = jnp.maximum(largest, 1e-30) / float(jnp.finfo(dtype).max)
    return (x / scale).astype(dtype).astype(x.dtype) * scale

  return jax.tree.map(rounded, params)


def roll_out(
  params: chex.ArrayTree, key: chex.PRNGKey, symbols_BxH: chex.Array, starts_B: chex.Array
) -> Rollout:
  """Plays every chain from its start state on.

  Args:
    params: the sampler's weights.
    key: of the sampling.
    symbols_BxH: the instances.
    starts_B: int, the step at which sampling begins. The chain is put into the state that the right
      words lead to, and those words are the context; 0 is the initial state.
  """
  batch, horizon = symbols_BxH.shape
  right_BxHx2 = chain.right_words(symbols_BxH)
  cache = models.init_cache(MODEL, batch, 1 + chain.STRIDE * horizon)
  one_B, two_B = jnp.ones(batch, jnp.int32), jnp.full(batch, 2, jnp.int32)

  def letter(
    key: chex.PRNGKey, logits_BxV: chex.Array, given_B: chex.Array, k: chex.Array
  ) -> tuple[chex.Array, chex.Array]:
    logp_BxV = models.distribution(logits_BxV, SAMPLING)
    drawn_B = jax.random.categorical(key, logp_BxV).astype(jnp.int32)
    token_B = jnp.where(k < starts_B, given_B, drawn_B)
    return token_B, jnp.take_along_axis(logp_BxV, token_B[:, None], axis=1)[:, 0]

  def step(carry: chex.ArrayTree, k: chex.Array) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    cache, last_B, alive_B = carry
    pair_Bx2 = jnp.stack([last_B, chain.FIRST_SYMBOL + symbols_BxH[:, k]], axis=1)
    logits, cache, _ = models.extend(MODEL, params, cache, pair_Bx2, two_B)
    keys = jax.random.split(jax.random.fold_in(key, k))
    first_B, first_logp_B = letter(keys[0], logits, right_BxHx2[:, k, 0], k)
    logits, cache, _ = models.extend(MODEL, params, cache, first_B[:, None], one_B)
    second_B, second_logp_B = letter(keys[1], logits, right_BxHx2[:, k, 1], k)
    word_Bx2 = jnp.stack([first_B, second_B], axis=1)
    after_B, _, reward_B = chain.transition(symbols_BxH, k, alive_B, word_Bx2)
    logp_Bx2 = jnp.stack([first_logp_B, second_logp_B], axis=1)
    return (cache, second_B, after_B), (word_Bx2, logp_Bx2, alive_B, reward_B > 0)

  carry = (cache, jnp.full(batch, chain.START, jnp.int32), jnp.ones(batch, bool))
  _, outputs = jax.lax.scan(step, carry, jnp.arange(horizon))
  words, logps, played, solved = (jnp.swapaxes(x, 0, 1) for x in outputs)
  taken_BxH = played & (jnp.arange(horizon)[None] >= starts_B[:, None])
  # Laid out as the tokens are: a column for the start, then one for each symbol before two letters.
  nan_BxHx1 = jnp.full((batch, horizon, 1), jnp.nan)
  logp_BxT = jnp.concatenate(
    [jnp.full((batch, 1), jnp.nan)]
    + [jnp.concatenate([nan_BxHx1, logps], axis=-1).reshape(batch, -1)],
    axis=1,
  )
  return Rollout(
    tokens=chain.lay_out(symbols_BxH, words),
    behavior_logp=jnp.where(chain.chunk_layout(taken_BxH) >= 0, logp_BxT, jnp.nan),
    taken=taken_BxH,
    played=played,
    success=solved[:, -1],
  )


def token_logps(params: chex.ArrayTree, tokens_BxT: chex.Array, real_BxT: chex.Array) -> chex.Array:
  """The trainer's log-prob of every token: [B, T]."""
  positions = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1])[None], tokens_BxT.shape)
  dense = models.Compute(experts="dense")
  segments = real_BxT.astype(jnp.int32)
  logits = models.forward(MODEL, params, tokens_BxT, segments, positions, dense)
  return models.token_logps(logits, tokens_BxT, SAMPLING)[0]
