"""Chunks as arrays: numbering them, summing over them, spreading their values over tokens.

Sums are scatters, not one-hot products: exact for any layout of the ids (chunks need not be
contiguous), and at B=64, T=4096 on a CPU their cost does not grow with the number of chunks.
"""

import chex
import jax
import jax.numpy as jnp


def segment_chunks(sampled_BxT: chex.Array, call_ids_BxT: chex.Array) -> chex.Array:
  """Numbers the chunks of each row; a chunk is the sampled tokens of one LLM call.

  Chunks follow call ids and never edges of the mask: two replies with nothing between them are two
  chunks, and a reply with unsampled tokens inside is one.

  Args:
    sampled_BxT: bool, whether the policy sampled the token.
    call_ids_BxT: int, which LLM call sampled it, unique within a row; read at sampled tokens only.
      A negative id is no call, and its token is in no chunk.

  Returns:
    chunk_ids_BxT: int32, -1 outside chunks, else 0..C-1 in order of first appearance in the row.
  """
  chex.assert_rank([sampled_BxT, call_ids_BxT], 2)
  chex.assert_equal_shape([sampled_BxT, call_ids_BxT])
  call_ids_BxT = jnp.asarray(call_ids_BxT).astype(jnp.int32)
  inside_BxT = jnp.asarray(sampled_BxT).astype(bool) & (call_ids_BxT >= 0)
  index_BxT = jax.lax.broadcasted_iota(jnp.int32, inside_BxT.shape, 1)

  # Sorting by (call, position) puts every call's first token at the head of its run; sorting back
  # by position then tells each token where its call began.
  key_BxT = jnp.where(inside_BxT, call_ids_BxT, -1)
  key_BxT, position_BxT = jax.lax.sort((key_BxT, index_BxT), dimension=1, num_keys=2)
  new_run_BxT = jnp.concatenate(
    [jnp.ones_like(inside_BxT[:, :1]), key_BxT[:, 1:] != key_BxT[:, :-1]], axis=1
  )
  head_BxT = jax.lax.cummax(jnp.where(new_run_BxT, index_BxT, 0), axis=1)
  first_BxT = jnp.take_along_axis(position_BxT, head_BxT, axis=1)
  _, first_BxT = jax.lax.sort((position_BxT, first_BxT), dimension=1, num_keys=1)

  starts_BxT = inside_BxT & (first_BxT == index_BxT)
  rank_BxT = jnp.cumsum(starts_BxT, axis=1, dtype=jnp.int32) - 1
  return jnp.where(inside_BxT, jnp.take_along_axis(rank_BxT, first_BxT, axis=1), -1)


def chunk_sums(values_BxT: chex.Array, chunk_ids_BxT: chex.Array, max_chunks: int) -> chex.Array:
  """Sums values over the tokens of each chunk.

  Args:
    values_BxT: float values; those outside chunks are not read, so they may be anything.
    chunk_ids_BxT: int, -1 outside chunks, else 0..max_chunks-1.
    max_chunks: C, the number of chunk slots a row (static).

  Returns:
    sums_BxC, in at least float32; 0 for an empty slot.
  """
  chex.assert_rank([values_BxT, chunk_ids_BxT], 2)
  chex.assert_equal_shape([values_BxT, chunk_ids_BxT])
  num_rows = chunk_ids_BxT.shape[0]
  # One slot more a row takes what is outside every chunk, and is cut off: no value has to be
  # masked.
  slots = max_chunks + 1
  slot_BxT = jnp.where(chunk_ids_BxT >= 0, chunk_ids_BxT, max_chunks)
  flat = slot_BxT + slots * jax.lax.broadcasted_iota(slot_BxT.dtype, slot_BxT.shape, 0)
  values_BxT = at_least_float32(values_BxT)
  sums = jax.ops.segment_sum(
    values_BxT.reshape(-1), flat.reshape(-1), num_segments=num_rows * slots
  )
  return sums.reshape(num_rows, slots)[:, :max_chunks]


def chunk_lengths(chunk_ids_BxT: chex.Array, max_chunks: int) -> chex.Array:
  """Counts the tokens of each chunk: [B, C] in jax's default float type, 0 for an empty slot."""
  ones_BxT = jnp.ones(chunk_ids_BxT.shape, float)
  return chunk_sums(ones_BxT, chunk_ids_BxT, max_chunks)


def spread_to_tokens(values_BxC: chex.Array, chunk_ids_BxT: chex.Array) -> chex.Array:
  """Gives every token the value of its chunk: [B, T], 0 (or False) outside chunks."""
  chex.assert_rank([values_BxC, chunk_ids_BxT], 2)
  chex.assert_equal_shape_prefix([values_BxC, chunk_ids_BxT], 1)
  inside_BxT = chunk_ids_BxT >= 0
  values_BxT = jnp.take_along_axis(values_BxC, jnp.where(inside_BxT, chunk_ids_BxT, 0), axis=1)
  return jnp.where(inside_BxT, values_BxT, jnp.zeros_like(values_BxT))


def at_least_float32(values: chex.Array) -> chex.Array:
  """Widens bfloat16 and float16 (and integers) to float32; float64 stays."""
  values = jnp.asarray(values)
  return values.astype(jnp.promote_types(values.dtype, jnp.float32))
