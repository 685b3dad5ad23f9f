"""Where layers stand in the parameters: one entry each, or like neighbours stacked.

Stacking changes no number; it makes layers run in one `lax.scan`, so that a deep model compiles as
fast as a shallow one.
"""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp

from rome.models.config import ModelConfig

_STACK = re.compile(r"layers_\d+_\d+")


@dataclasses.dataclass(frozen=True)
class Stage:
  """Layers `first` to `first + count - 1`, which run as one.

  Attributes:
    first: index of the first layer.
    count: how many layers.
    sparse: whether they have experts.
    stacked: whether their arrays have a leading axis of length `count`.
  """

  first: int
  count: int
  sparse: bool
  stacked: bool

  @property
  def name(self) -> str:
    """Key of the stage in the parameters."""
    last = f"_{self.first + self.count - 1}" if self.stacked else ""
    return f"layers_{self.first}{last}"


def stages(config: ModelConfig, stacked: bool) -> tuple[Stage, ...]:
  """The stages of a model in order; `stacked` joins neighbours of one kind."""
  found: list[Stage] = []
  for i in range(config.num_hidden_layers):
    sparse = config.is_sparse(i)
    if stacked and found and found[-1].sparse == sparse:
      found[-1] = Stage(found[-1].first, found[-1].count + 1, sparse, True)
    else:
      found.append(Stage(i, 1, sparse, False))
  return tuple(found)


def is_stacked(params: chex.ArrayTree) -> bool:
  """Whether `params` have stacked layers."""
  return any(_STACK.fullmatch(name) for name in params)


def stack_layers(config: ModelConfig, params: chex.ArrayTree) -> dict:
  """The same parameters with like neighbours stacked."""
  out = {k: v for k, v in params.items() if not k.startswith("layers_")}
  for stage in stages(config, stacked=True):
    one = [params[f"layers_{stage.first + i}"] for i in range(stage.count)]
    out[stage.name] = jax.tree.map(lambda *x: jnp.stack(x), *one) if stage.stacked else one[0]
  return out


def unstack_layers(config: ModelConfig, params: chex.ArrayTree) -> dict:
  """The inverse of `stack_layers`."""
  out = {k: v for k, v in params.items() if not k.startswith("layers_")}
  for stage in stages(config, stacked=True):
    for i in range(stage.count):
      layer = params[stage.name]
      if stage.stacked:
        layer = jax.tree.map(lambda x, i=i: x[i], layer)
      out[f"layers_{stage.first + i}"] = layer
  return out
