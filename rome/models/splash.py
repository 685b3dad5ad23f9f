"""Splash attention: the Pallas kernel of jax for TPUs, on packed rows.

Neither pass holds [T, T] scores, and blocks where no query may see a key are left out. Only the
causal mask leaves blocks out; segments are data, and the kernel's blocks are fixed when it is
compiled. On a mesh `rome.models.context_parallel` gives each device its rows and heads.

Source: jax.experimental.pallas.ops.tpu.splash_attention.
"""

import chex
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

_LANES = 128  # of a TPU's registers: blocks and widths of heads are multiples of it
# Choice: it compiles within the vector memory of v5e, v5p and v6e; not tuned on a TPU.
_BLOCK = 512


def splash_attention(
  q_BxTxNxH: chex.Array,
  k_BxTxGxH: chex.Array,
  v_BxTxGxH: chex.Array,
  segment_ids_BxT: chex.Array,
  interpret: bool = False,
) -> chex.Array:
  """`attention.packed_attention` on one device: [B, T, N, H].

  Args:
    q_BxTxNxH: queries; N a multiple of G.
    k_BxTxGxH: keys.
    v_BxTxGxH: values.
    segment_ids_BxT: int32; tokens attend within their segment.
    interpret: evaluates the kernel in plain jax, which any machine can.
  """
  t, n, h = q_BxTxNxH.shape[1:]
  block = min(_BLOCK, t + -t % _LANES)
  # What fills the last block stands behind every token, so that no token sees it.
  behind, wider = -t % block, -h % _LANES

  def heads_first(x_BxTxNxH: chex.Array) -> chex.Array:
    return jnp.pad(x_BxTxNxH, ((0, 0), (0, behind), (0, 0), (0, wider))).swapaxes(1, 2)

  q, k, v = (heads_first(x) for x in (q_BxTxNxH * h**-0.5, k_BxTxGxH, v_BxTxGxH))
  ids = jnp.pad(segment_ids_BxT, ((0, 0), (0, behind)))
  attend = kernel.make_splash_mha(
    masks.MultiHeadMask([masks.CausalMask((t + behind, t + behind))] * n),
    block_sizes=kernel.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  out = jax.vmap(lambda q, k, v, i: attend(q, k, v, kernel.SegmentIds(i, i)))(q, k, v, ids)
  return out.swapaxes(1, 2)[:, :t, :, :h].astype(q_BxTxNxH.dtype)
