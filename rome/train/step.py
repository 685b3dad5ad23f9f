"""Updates: (state, batch) -> (state, metrics).

Gradients are accumulated over micro-batches of one constant shape. Losses divide by counts of the
whole batch, so the number of micro-batches changes nothing but memory (and, where the router's load
is balanced, one forward pass more, see `rome.models.balance`). Parameters with adapters
(`rome.models.lora`) train these alone.

Sums of gradients and the optimiser's state are updated in place, and new parameters take the place
of a gradient (`rome.train.optimise`). So an update takes the memory of the parameters, the moments
and a gradient (of two, with several micro-batches), and the optimiser's state that it was given is
gone. Its parameters are not: the engine may still sample from them.

`numerics="exact"` scores with `rome.models.exact`: micro-batches then have the engine's shape, one
trajectory a row, and the log-probs are the engine's bit for bit.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rome import ipa, models
from rome.models import balance, exact, lora
from rome.models.router import Stats
from rome.train import optimise
from rome.train.metrics import MISMATCH_PARTS
from rome.train.placement import on_devices
from rome.train.state import TrainState
from rome.trajectory import Trajectory

Metrics = dict[str, chex.Array]
NO_ROUTER_LOSS = models.RouterLoss()
Grads = tuple[chex.ArrayTree, tuple[Metrics, Stats]]
Estimator = Callable[..., tuple[chex.Array, Metrics]]


class NonFinite(FloatingPointError):
  """An update that was not finite, and so was not applied.

  Attributes:
    update: its number.
    names: the metrics that were not finite.
    rows: of the batch, those that give such values alone, else those of such micro-batches, else
      all.
    trajectories: theirs, where the caller knows them (`rome.train.nonfinite`).
  """

  def __init__(self, update: int, names: Sequence[str], rows: Sequence[int], where: str = ""):
    self.update, self.names, self.rows = update, tuple(names), tuple(rows)
    self.trajectories: tuple[Trajectory, ...] = ()
    super().__init__(
      f"update {update}: {', '.join(names)} not finite; the update was not applied. "
      f"{where + '. ' if where else ''}Lower the learning rate or resume from an earlier checkpoint"
    )


def _token_logps(
  config: models.ModelConfig,
  sampling: models.Sampling,
  numerics: str,
  params: chex.ArrayTree,
  batch: ipa.ChunkBatch,
) -> tuple[chex.Array, chex.Array, Stats]:
  """Log-probs and entropies [B, T], and the router's statistics."""
  if numerics == "exact":
    lengths = jnp.sum(batch.segment_ids != 0, axis=1)
    return exact.exact_logps(config, sampling, params, batch.tokens, lengths)
  hidden, stats = models.hidden_states(
    config, params, batch.tokens, batch.segment_ids, batch.positions
  )
  kernel = models.head_kernel(config, params)
  tied = config.tie_word_embeddings
  return *models.head_logps(hidden, kernel, batch.tokens, sampling, tied), stats


def _grad(loss_fn: Callable[[chex.ArrayTree], tuple], params: chex.ArrayTree) -> Grads:
  """The gradient of what trains, with the loss's metrics and sums over tokens of the router."""
  trainable, frozen = lora.split(params)
  return jax.grad(lambda part: loss_fn(lora.join(part, frozen)), has_aux=True)(trainable)


def _ipa_grad(
  config: models.ModelConfig,
  sampling: models.Sampling,
  numerics: str,
  ipa_config: ipa.IPAConfig,
  router_loss: models.RouterLoss,
  estimator: Estimator,
  params: chex.ArrayTree,
  batch: ipa.ChunkBatch,
  totals: ipa.Totals,
  router_totals: balance.RouterTotals,
) -> Grads:
  def loss_fn(params: chex.ArrayTree) -> tuple[chex.Array, tuple[Metrics, Stats]]:
    logp, entropy, stats = _token_logps(config, sampling, numerics, params, batch)
    loss, metrics = estimator(logp, batch, ipa_config, totals, entropy)
    # Of what the policy sampled; experts are somebody else's words.
    sampled = ipa.spread_to_tokens(~batch.il_mask, batch.chunk_ids)
    metrics["entropy"] = jnp.where(sampled, entropy, 0).sum() / jnp.maximum(totals.rl.tokens, 1)
    metrics["loss"] = loss
    metrics |= ipa.mismatch_by_position(logp, batch, MISMATCH_PARTS)
    loss += balance.router_loss(stats, router_totals, router_loss)
    return loss, (metrics, balance.sums(stats))

  return _grad(loss_fn, params)


# The gradient of a micro-batch, by numerics; like `sft_grad` also compiled for the memory plan.
IPA_GRAD = {
  "fast": jax.jit(_ipa_grad, static_argnums=(0, 1, 2, 3, 4, 5)),
  "exact": jax.jit(
    _ipa_grad, static_argnums=(0, 1, 2, 3, 4, 5), compiler_options=exact.COMPILER_OPTIONS
  ),
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def sft_grad(
  config: models.ModelConfig,
  sampling: models.Sampling,
  router_loss: models.RouterLoss,
  params: chex.ArrayTree,
  batch: ipa.ChunkBatch,
  tokens: chex.Array,
  router_totals: balance.RouterTotals,
) -> Grads:
  weight = jnp.maximum(tokens, 1)

  def loss_fn(params: chex.ArrayTree) -> tuple[chex.Array, tuple[Metrics, Stats]]:
    logp, _, stats = _token_logps(config, sampling, "fast", params, batch)
    total, _ = ipa.sft_loss(logp, batch.chunk_ids, batch.il_mask)
    # A token counts as right when it is more likely than not: cheap, and equal to greedy accuracy
    # near convergence.
    imitated = ipa.spread_to_tokens(batch.il_mask, batch.chunk_ids)
    right = jnp.where(imitated & (logp > jnp.log(0.5)), 1.0, 0.0).sum()
    loss = total / weight + balance.router_loss(stats, router_totals, router_loss)
    metrics = {"loss": total / weight, "accuracy": right / weight}
    return loss, (metrics, balance.sums(stats))

  return _grad(loss_fn, params)


@functools.partial(jax.jit, static_argnums=0)
def _load(config: models.ModelConfig, params: chex.ArrayTree, batch: ipa.ChunkBatch) -> chex.Array:
  """Token copies that each expert of each sparse layer gets, [S, E]."""
  _, stats = models.hidden_states(config, params, batch.tokens, batch.segment_ids, batch.positions)
  return stats["load"]


def _router_totals(
  config: models.ModelConfig,
  weights: models.RouterLoss,
  params: chex.ArrayTree,
  batch: ipa.ChunkBatch,
  micro_batches: Sequence[ipa.ChunkBatch],
) -> balance.RouterTotals:
  sparse = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
  rows = sparse * int(np.count_nonzero(batch.segment_ids))
  load = None
  if weights.balance and sparse and len(micro_batches) > 1:
    load = functools.reduce(_add, [_load(config, params, m) for m in micro_batches])
  return balance.RouterTotals(rows=np.float32(max(rows, 1)), load=load)


@functools.partial(jax.jit, donate_argnums=0)
def _accumulate(total: Grads, part: Grads) -> Grads:
  (grads, (metrics, sums)), (more, (others, more_sums)) = total, part
  grads, sums = jax.tree.map(jnp.add, (grads, sums), (more, more_sums))
  pairs = jax.tree.map(lambda *xs: jnp.stack(xs), metrics, others)
  return grads, (ipa.reduce_metrics(pairs), sums)


@jax.jit
def _tell(found: Grads) -> Metrics:
  """What is told of an update."""
  grads, (metrics, sums) = found
  return metrics | balance.router_metrics(sums) | {"grad_norm": optax.tree.norm(grads)}


_totals = jax.jit(ipa.loss_totals, static_argnums=1)
_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))


def _update(
  optimizer: optax.GradientTransformation,
  state: TrainState,
  micro_batches: Sequence[ipa.ChunkBatch],
  grad_fn: Callable[[chex.ArrayTree, ipa.ChunkBatch], Grads],
) -> tuple[TrainState, dict[str, float]]:
  """Sums gradients and metrics of the micro-batches, checks them, applies the optimiser."""
  found = grad_fn(state.params, micro_batches[0])
  for batch in micro_batches[1:]:
    found = _accumulate(found, grad_fn(state.params, batch))
  told = _tell(found)
  metrics = {k: float(v) for k, v in jax.device_get(told).items()}
  bad = [k for k, v in metrics.items() if not math.isfinite(v)]
  if bad:
    raise NonFinite(int(state.step), bad, _bad_rows(state.params, micro_batches, grad_fn))
  params, opt_state = optimise.apply(
    optimizer, state.params, state.opt_state, found[0], told["grad_norm"]
  )
  state = dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1)
  return state, metrics


@jax.jit
def _finite(found: Grads) -> chex.Array:
  """Whether all of a gradient, its norm, and the metrics are finite."""
  leaves = jax.tree.leaves((found, optax.tree.norm(found[0])))
  return jnp.all(jnp.array([jnp.isfinite(x).all() for x in leaves]))


def _bad_rows(
  params: chex.ArrayTree,
  micro_batches: Sequence[ipa.ChunkBatch],
  grad_fn: Callable[[chex.ArrayTree, ipa.ChunkBatch], Grads],
) -> list[int]:
  """The rows of the batch that a value which is not finite comes from; see `NonFinite.rows`.

  Each micro-batch of which one is bad is computed again for each of its rows, in its own shape.
  """
  rows, size = [], len(micro_batches[0].tokens)
  for n, batch in enumerate(micro_batches):
    if not _finite(grad_fn(params, batch)):
      alone = [
        r
        for r in range(size)
        if not _finite(grad_fn(params, jax.tree.map(lambda x, r=r: x[np.full(size, r)], batch)))
      ]
      rows += [n * size + r for r in alone or range(size)]
  return rows or list(range(size * len(micro_batches)))


def _split(batch: ipa.ChunkBatch, rows: int) -> list[ipa.ChunkBatch]:
  """Micro-batches, on the devices that train."""
  return on_devices(
    [jax.tree.map(lambda x, i=i: x[i : i + rows], batch) for i in range(0, len(batch.tokens), rows)]
  )


def ipa_step(
  state: TrainState,
  batch: ipa.ChunkBatch,
  *,
  config: models.ModelConfig,
  sampling: models.Sampling,
  ipa_config: ipa.IPAConfig,
  optimizer: optax.GradientTransformation,
  micro_rows: int,
  num_trajectories: int,
  router_loss: models.RouterLoss = NO_ROUTER_LOSS,
  estimator: Estimator = ipa.ipa_loss,
  numerics: str = "fast",
) -> tuple[TrainState, dict[str, float]]:
  """One IPA update (Eqs. 9-10).

  Args:
    state: before the update, which takes over its `opt_state`.
    batch: of numpy arrays, rows a multiple of `micro_rows`.
    config: the model's sizes.
    sampling: the settings that the batch was sampled under.
    ipa_config: the loss.
    optimizer: the one that made `state.opt_state`.
    micro_rows: rows a micro-batch.
    num_trajectories: static upper bound on the batch's trajectory ids + 1.
    router_loss: weights of the router's auxiliary losses.
    estimator: the loss, with the signature of `ipa.ipa_loss`.
    numerics: "fast", or "exact": each row has one trajectory from its first place on, `micro_rows`
      are the engine's slots and a row has the places of its cache.
  Returns:
    The next state, and metrics of `ipa.ipa_loss` with its `loss` (without the router's), `entropy`,
    `ipa.mismatch_profile`, the unclipped `grad_norm`, and `balance.router_metrics` of all tokens
    where there are experts.
  Raises:
    NonFinite: something was not finite; nothing was updated, and `state` is whole.
  """
  micro = _split(batch, micro_rows)
  totals = functools.reduce(_add, [_totals(m, num_trajectories) for m in micro])
  router_totals = _router_totals(config, router_loss, state.params, batch, micro)
  grad = IPA_GRAD[numerics]
  static = (config, sampling, numerics, ipa_config, router_loss, estimator)
  state, metrics = _update(
    optimizer,
    state,
    micro,
    lambda params, m: grad(*static, params, m, totals, router_totals),
  )
  return state, ipa.mismatch_profile(metrics)


def sft_step(
  state: TrainState,
  batch: ipa.ChunkBatch,
  *,
  config: models.ModelConfig,
  optimizer: optax.GradientTransformation,
  micro_rows: int,
  router_loss: models.RouterLoss = NO_ROUTER_LOSS,
) -> tuple[TrainState, dict[str, float]]:
  """One supervised update (Eq. 1) on the chunks that `batch.il_mask` marks.

  Arguments as in `ipa_step`.
  """
  micro = _split(batch, micro_rows)
  sampling = models.Sampling()
  tokens = functools.reduce(_add, [_totals(m, 1) for m in micro]).il.tokens
  router_totals = _router_totals(config, router_loss, state.params, batch, micro)
  return _update(
    optimizer,
    state,
    micro,
    lambda params, m: sft_grad(config, sampling, router_loss, params, m, tokens, router_totals),
  )
