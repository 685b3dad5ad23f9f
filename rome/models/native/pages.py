"""The paged KV cache: keys and values of 16 positions a page, for all layers.

A page is one piece of memory, so that a copy is one move. Which row has which page is the caller's
business: rows name their pages in a table, and may share pages whose contents are equal.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct

from rome.models.config import ModelConfig

PAGE = 16  # positions a page


@struct.dataclass
class Pages:
  """A pool of P pages.

  Attributes:
    k: [P, layers, G, H, 16] float32; transposed, so that the scores of a page are one vector.
    v: [P, layers, G, 16, H padded to 16] float32.
    choices: [P, 16, S, K] int32, the experts that the router chose for the token at each place at
      each of S sparse layers; of size 0 where there are none.
  """

  k: jax.Array
  v: jax.Array
  choices: jax.Array


def init_pages(config: ModelConfig, num_pages: int) -> Pages:
  """A pool of `num_pages` pages of zeros."""
  layers, groups = config.num_hidden_layers, config.num_key_value_heads
  sparse = sum(config.is_sparse(i) for i in range(layers))
  padded = -(-config.head_dim // 16) * 16
  return Pages(
    k=jnp.zeros((num_pages, layers, groups, config.head_dim, PAGE)),
    v=jnp.zeros((num_pages, layers, groups, PAGE, padded)),
    choices=jnp.zeros((num_pages, PAGE, sparse, config.num_experts_per_tok), jnp.int32),
  )


def copy_pages(pages: Pages, source_C: chex.Array, target_C: chex.Array) -> Pages:
  """Copies page source[c] to page target[c]; all are read before any is written.

  Args:
    pages: the pool; updated in place if it is donated.
    source_C: [C] int32.
    target_C: [C] int32; those outside 0..P-1 are dropped. The others must differ.
  """

  def copy(x: chex.Array) -> chex.Array:
    target = jnp.where(target_C < 0, len(x), target_C)  # negative ids would count from the end
    return x.at[target].set(jnp.take(x, source_C, axis=0, mode="clip"), mode="drop")

  return jax.tree.map(copy, pages)
