"""The custom calls: tokens into a paged cache, and logits of hidden states."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rome.models import sharding
from rome.models.config import Compute, ModelConfig
from rome.models.native import build
from rome.models.native.packing import Packed
from rome.models.native.pages import Pages

_K, _V, _CHOICES = 4, 5, 6  # places of the pages among the arguments, see xla.c


def unavailable(config: ModelConfig, compute: Compute) -> str | None:
  """Why the native forward pass cannot serve a model here, in words; None if it can.

  Compiles at the first call. Every `config` can be served; it is asked for so that one that cannot
  some day has a place to say so.
  """
  del config
  if compute.dtype != "float32":
    return f"it computes in float32, and compute.dtype is {compute.dtype}"
  if jax.default_backend() != "cpu":
    return f"it runs on CPUs, and jax's backend is {jax.default_backend()}"
  if sharding.in_use():
    return "it runs on one device, and a mesh is in use"
  try:
    build.register()
  except build.NativeUnavailable as e:
    return str(e)
  return None


def extend(
  config: ModelConfig,
  packed: Packed,
  pages: Pages,
  tokens_N: chex.Array,
  rows_N: chex.Array,
  positions_N: chex.Array,
  table_RxM: chex.Array,
  threads: int = 0,
) -> tuple[chex.Array, Pages]:
  """Appends tokens to rows: one flat batch, of any number of tokens a row.

  The bits of a token's hidden state depend on the weights and the tokens of its own context alone:
  not on its company, its row, its pages, the calls that its context came in, or `threads`.

  Args:
    config: static, the model's sizes.
    packed: its weights, by `pack`.
    pages: the pool; updated in place where jax may (donated, or carried by a loop).
    tokens_N: [N] int32 token ids.
    rows_N: [N] int32, the row of each token.
    positions_N: [N] int32, its place in the row; -1: no token, costs nothing. All positions in
      front of it must be in the pool already or in this call. Tokens of a row that follow each
      other are faster.
    table_RxM: [R, M] int32: position p of row r is place p % 16 of page table[r, p // 16]. Entries
      behind a row's last position are not read.
    threads: static, at most so many threads; 0 for as many as XLA has.
  Returns:
    hidden states [N, D] float32 after the final norm, 0 where there is no token, and the pages.
  Raises:
    NativeUnavailable: see `unavailable`.
    jax.errors.JaxRuntimeError: when run, a token, row, page or position is out of range.
  """
  build.register()
  c = config
  sizes = [c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim]
  sizes += [c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size, c.intermediate_size]
  sizes += [c.num_hidden_layers, c.vocab_size, int(c.norm_topk_prob), threads]
  ints = [jnp.asarray(x, jnp.int32) for x in (tokens_N, rows_N, positions_N, table_RxM)]
  arrays = [*ints, pages.k, pages.v, pages.choices, packed.embedding, packed.rope, packed.norm]
  like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (pages.k, pages.v, pages.choices)]
  hidden = jax.ShapeDtypeStruct((len(ints[0]), c.hidden_size), jnp.float32)
  call = jax.ffi.ffi_call(
    "rome_native_extend", [hidden, *like], input_output_aliases={_K: 1, _V: 2, _CHOICES: 3}
  )
  hidden_NxD, k, v, choices = call(
    *arrays,
    *(x for layer in packed.layers for x in layer),
    sizes=np.array(sizes, np.int64),
    epsilon=np.float32(c.rms_norm_eps),
  )
  return hidden_NxD, Pages(k=k, v=v, choices=choices)


def logits(
  config: ModelConfig,
  packed: Packed,
  hidden_NxD: chex.Array,
  active_N: chex.Array,
  threads: int = 0,
) -> chex.Array:
  """Logits [N, V] float32 of hidden states [N, D] float32; zeros where `active_N` [N] is False.

  The bits of a row depend on the weights and that row alone. Rows that are not active cost nothing.
  """
  build.register()
  out = jax.ShapeDtypeStruct((len(hidden_NxD), config.vocab_size), jnp.float32)
  call = jax.ffi.ffi_call("rome_native_logits", out)
  return call(hidden_NxD, active_N.astype(bool), packed.head, threads=np.int64(threads))
