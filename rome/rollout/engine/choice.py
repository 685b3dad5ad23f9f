"""Which backend serves a model here, and whether parameters are that model's."""

import functools

import chex
import jax

from rome import models
from rome.models import native
from rome.models.layout import is_stacked, unstack_layers
from rome.rollout.engine.backend import Backend
from rome.rollout.engine.exact import ExactBackend
from rome.rollout.engine.native import NativeBackend
from rome.rollout.engine.xla import XlaBackend


def _shapes(tree: chex.ArrayTree) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path): x.shape for path, x in leaves}


@functools.cache
def _shapes_of(config: models.ModelConfig) -> dict[str, tuple[int, ...]]:
  init = functools.partial(models.init_params, config)
  return _shapes(jax.eval_shape(init, jax.random.key(0)))


def check_params(config: models.ModelConfig, params: chex.ArrayTree) -> None:
  """Checks parameters, stacked or not, against the model's sizes.

  Raises:
    ValueError: they are of another model; the message names the first array that differs.
  """

  def plain(params: chex.ArrayTree) -> chex.ArrayTree:
    return unstack_layers(config, params) if is_stacked(params) else params

  want = _shapes_of(config)
  try:
    have = _shapes(jax.eval_shape(plain, params))
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"parameters of another model than config: {error!r}") from None
  for name in sorted(want.keys() | have.keys()):
    if want.get(name) != have.get(name):
      raise ValueError(
        f"parameters of another model than config: {name} is {have.get(name, 'missing')}, "
        f"config wants {want.get(name, 'none')}"
      )


def choose(
  config: models.ModelConfig,
  numerics: str,
  name: str,
  compute: models.Compute | None,
  stacked: bool,
  steps: int,
  max_length: int,
) -> Backend:
  """The backend that serves these settings; see `rome.rollout.engine.Engine`.

  Raises:
    ValueError: none does; the message names the setting.
  """
  if numerics not in ("fast", "exact"):
    raise ValueError(f'numerics must be "fast" or "exact", got {numerics!r}')
  if name not in ("auto", "native", "xla"):
    raise ValueError(f'backend must be "auto", "native" or "xla", got {name!r}')
  xla_compute = compute or models.config.ROW_COMPUTE
  if numerics == "exact":
    if name != "auto":
      raise ValueError(f'backend={name!r} is for numerics="fast"; "exact" has one of its own')
    return ExactBackend(config, xla_compute, stacked, steps)
  if name == "xla":
    return XlaBackend(config, xla_compute, stacked, steps)
  why_not = native.unavailable(config, compute or models.config.ROW_COMPUTE)
  if why_not is None:
    return NativeBackend(config, max_length)
  if name == "native":
    raise ValueError(f'backend="native" cannot serve this: {why_not}')
  return XlaBackend(config, xla_compute, stacked, steps)
