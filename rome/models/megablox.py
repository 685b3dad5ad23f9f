"""Grouped matrix product for TPUs, forward and backward in the Pallas kernels of jax.

`jax.lax.ragged_dot` compiles to a kernel of its own on TPUs, but its gradient with respect to the
weights multiplies every expert with every row (jax 0.10.2, libtpu 0.0.42): 128 experts, 128 times
the work. Here that gradient is a kernel too.

Source: jax.experimental.pallas.ops.tpu.megablox.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

# Choice: tiles of rows, inputs, outputs that compile within the vector memory of v5e, v5p and v6e;
# not tuned on a TPU.
_ROWS = 512
_INPUTS, _OUTPUTS = 1024, 1024


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
  x_MxD: chex.Array, w_ExDxF: chex.Array, sizes_E: chex.Array, interpret: bool = False
) -> chex.Array:
  """Rows of group e times w[e]: [M, F], in the dtype of `x_MxD`, summed in float32.

  Args:
    x_MxD: [M, D] rows, those of group 0 first.
    w_ExDxF: [E, D, F], in the same dtype.
    sizes_E: int32 [E], rows of each group; rows behind the last group give 0.
    interpret: static, evaluates the kernels in plain jax, which any machine can.
  """
  return _forward(x_MxD, w_ExDxF, sizes_E, interpret, transposed=False)


def _forward(
  x_MxD: chex.Array, w: chex.Array, sizes_E: chex.Array, interpret: bool, transposed: bool
) -> chex.Array:
  rows = len(x_MxD)
  x = jnp.pad(x_MxD, ((0, -rows % _tile(rows)), (0, 0)))
  inputs, outputs = w.shape[1:][::-1] if transposed else w.shape[1:]
  tiling = (_tile(rows), min(_INPUTS, inputs), min(_OUTPUTS, outputs))
  y = gmm(x, w, sizes_E, x.dtype, tiling=tiling, transpose_rhs=transposed, interpret=interpret)
  # The kernel does not visit rows behind the last group: they hold what the memory held.
  return jnp.where(_inside(rows, sizes_E), y[:rows], 0)


def _tile(rows: int) -> int:
  return min(_ROWS, rows + -rows % 8)


def _inside(rows: int, sizes_E: chex.Array) -> chex.Array:
  return (jnp.arange(rows) < jnp.sum(sizes_E))[:, None]


def _fwd(
  x_MxD: chex.Array, w_ExDxF: chex.Array, sizes_E: chex.Array, interpret: bool
) -> tuple[chex.Array, tuple]:
  return grouped_matmul(x_MxD, w_ExDxF, sizes_E, interpret), (x_MxD, w_ExDxF, sizes_E)


def _bwd(interpret: bool, saved: tuple, grad_MxF: chex.Array) -> tuple:
  x_MxD, w_ExDxF, sizes_E = saved
  rows, (inputs, outputs) = len(x_MxD), w_ExDxF.shape[1:]
  dx = _forward(grad_MxF, w_ExDxF, sizes_E, interpret, transposed=True)
  # Rows behind the last group weigh nothing, but 0 * NaN would.
  x, grad = (jnp.where(_inside(rows, sizes_E), z, 0) for z in (x_MxD, grad_MxF))
  x, grad = (jnp.pad(z, ((0, -rows % _tile(rows)), (0, 0))) for z in (x, grad))
  tiling = (_tile(rows), min(_INPUTS, inputs), min(_OUTPUTS, outputs))
  dw = tgmm(x.T, grad, sizes_E, w_ExDxF.dtype, tiling=tiling, interpret=interpret)
  # Empty groups are not visited either.
  return dx, jnp.where((sizes_E > 0)[:, None, None], dw, 0), None


grouped_matmul.defvjp(_fwd, _bwd)
