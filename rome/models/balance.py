"""How evenly the router spreads tokens over experts: two auxiliary losses and what to watch.

Everything comes from the sums of `router.router_stats`, with the batch's totals as denominators.

The load-balancing loss (Switch Transformer, arXiv:2101.03961, eqs. 4-6) is that of transformers'
`load_balancing_loss_func` for Qwen3-MoE: with f_e the token copies that expert e got and p_e the
router's probability for it, both summed over the real tokens of all sparse layers and divided by
N = tokens * sparse layers, it is E * sum_e f_e p_e. It is K where either is even, and at most E.
Layers are pooled, so uneven layers that even each other out cost nothing; `load_metrics` looks at
each layer.

A product of two sums does not add up over micro-batches. But f is piecewise constant and carries no
gradient, so once the load of the whole batch is known, E / N^2 * sum_e load_e prob_e is linear in
the micro-batch's probabilities: parts add up to the value and to the gradient of the whole. The
price is a forward pass over all micro-batches for their loads, where there are several.
Choice: exact global balance, not each micro-batch's own, which would punish a batch for being cut
and keep experts from specialising (arXiv:2501.11873).

The z-loss (ST-MoE, arXiv:2202.08906) is the mean of squared log-partition functions over
real tokens and sparse layers: it keeps router logits small. It adds up as it is.
"""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
from flax import struct

from rome.models.router import Stats


@dataclasses.dataclass(frozen=True)
class RouterLoss:
  """Weights of the auxiliary losses; static.

  Attributes:
    balance: of `balance_loss`; public recipes use 1e-3 to 1e-2.
    z: of `z_loss`; ST-MoE uses 1e-3.
  """

  balance: float = 0.0
  z: float = 0.0

  def __post_init__(self) -> None:
    for name in ("balance", "z"):
      if not 0 <= getattr(self, name) < math.inf:
        raise ValueError(f"router loss weight {name} must be at least 0, got {getattr(self, name)}")


@struct.dataclass
class RouterTotals:
  """What the losses of a part need to know of the whole batch.

  Attributes:
    rows: N, [] float32, its real tokens times sparse layers.
    load: [S, E] float32, token copies that each expert got in it; None where the part is the whole.
  """

  rows: chex.Numeric
  load: jax.Array | None = None


def sums(stats: Stats) -> Stats:
  """The statistics that add up over micro-batches: all but `choices`. Empty without experts."""
  return {name: jax.lax.stop_gradient(x) for name, x in stats.items() if name != "choices"}


def balance_loss(stats: Stats, load_SxE: chex.Array, rows: chex.Numeric) -> chex.Array:
  """This part's share of the load-balancing loss; the parts of a batch add up to it.

  Args:
    stats: of this part, as `hidden_states` returns them; reads `prob` [S, E].
    load_SxE: [S, E] token copies that each expert got in the whole batch.
    rows: N, real tokens of the whole batch times sparse layers.
  Returns:
    scalar; its gradient reaches `prob` alone.
  """
  chex.assert_equal_shape([stats["prob"], load_SxE])
  load_E = jax.lax.stop_gradient(load_SxE).sum(axis=0)
  # Divided first: the product of two sums over a large batch outgrows float32's integers.
  return load_E.shape[0] * jnp.sum(load_E / rows * (stats["prob"].sum(axis=0) / rows))


def z_loss(stats: Stats, rows: chex.Numeric) -> chex.Array:
  """This part's share of the router z-loss; `rows` as in `balance_loss`."""
  return stats["z"].sum() / rows


def router_loss(stats: Stats, totals: RouterTotals, weights: RouterLoss) -> chex.Array:
  """The weighted losses of this part; 0, at no cost, where both weights are or without experts.

  Args:
    stats: of this part.
    totals: of the whole batch.
    weights: static.
  """
  loss = jnp.zeros(())
  if weights.balance and stats:
    load = stats["load"] if totals.load is None else totals.load
    loss += weights.balance * balance_loss(stats, load, totals.rows)
  if weights.z and stats:
    loss += weights.z * z_loss(stats, totals.rows)
  return loss


def router_metrics(sums: Stats) -> dict[str, chex.Array]:
  """What to watch, from the sums of a whole batch; {} without experts.

  Args:
    sums: `load` [S, E], `prob` [S, E] and `z` [S], added up over the batch (`sums`).
  Returns:
    `router_balance` and `router_z`: the losses, unweighted; and `load_metrics`.
  """
  if not sums:
    return {}
  # Probabilities of one token sum to 1.
  rows = jnp.maximum(sums["prob"].sum(), 1.0)
  return {
    "router_balance": balance_loss(sums, sums["load"], rows),
    "router_z": z_loss(sums, rows),
    **load_metrics(sums["load"]),
  }


def load_metrics(load_SxE: chex.Array) -> dict[str, chex.Array]:
  """How even the load of experts is.

  Args:
    load_SxE: [S, E] token copies that each expert of each sparse layer got.
  Returns:
    `expert_load_max`: load of the busiest expert over the mean load of its layer, in the worst
      layer: 1 is even, E / K one where every token goes;
    `expert_idle`: share of experts, over all layers, that got nothing;
    `expert_entropy`: entropy of the load over log E, the mean over layers: 1 is even, 0 all on one.
  """
  chex.assert_rank(load_SxE, 2)
  share = load_SxE / jnp.maximum(load_SxE.sum(axis=1, keepdims=True), 1.0)
  experts = load_SxE.shape[1]
  entropy = -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1.0)), axis=1)
  return {
    "expert_load_max": share.max() * experts,
    "expert_idle": jnp.mean(load_SxE == 0),
    "expert_entropy": jnp.mean(entropy) / max(math.log(experts), 1e-9),
  }
