"""Updates: (state, batch) -> (state, metrics), pure.

Gradients are accumulated over micro-batches of one constant shape. Losses divide by counts of the
whole batch, so the number of micro-batches changes nothing but memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import optax

from rome import ipa, models
from rome.train.state import TrainState

Metrics = dict[str, chex.Array]


def _token_logps(
  config: models.ModelConfig,
  sampling: models.Sampling,
  params: chex.ArrayTree,
  batch: ipa.ChunkBatch,
) -> tuple[chex.Array, chex.Array]:
  logits = models.forward(config, params, batch.tokens, batch.segment_ids, batch.positions)
  return models.token_logps(logits, batch.tokens, sampling)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _ipa_grad(
  config: models.ModelConfig,
  sampling: models.Sampling,
  ipa_config: ipa.IPAConfig,
  params: chex.ArrayTree,
  batch: ipa.ChunkBatch,
  totals: ipa.Totals,
) -> tuple[chex.ArrayTree, Metrics]:
  def loss_fn(params: chex.ArrayTree) -> tuple[chex.Array, Metrics]:
    logp, entropy = _token_logps(config, sampling, params, batch)
    loss, metrics = ipa.ipa_loss(logp, batch, ipa_config, totals, entropy)
    # Of what the policy sampled; experts are somebody else's words.
    sampled = ipa.spread_to_tokens(~batch.il_mask, batch.chunk_ids)
    metrics["entropy"] = jnp.where(sampled, entropy, 0).sum() / jnp.maximum(totals.rl.tokens, 1)
    return loss, metrics | {"loss": loss}

  return jax.grad(loss_fn, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sft_grad(
  config: models.ModelConfig,
  sampling: models.Sampling,
  params: chex.ArrayTree,
  batch: ipa.ChunkBatch,
  weight: chex.Numeric,
) -> tuple[chex.ArrayTree, Metrics]:
  def loss_fn(params: chex.ArrayTree) -> tuple[chex.Array, Metrics]:
    logp, _ = _token_logps(config, sampling, params, batch)
    total, _ = ipa.sft_loss(logp, batch.chunk_ids, batch.il_mask)
    # A token counts as right when it is more likely than not: cheap, and equal to greedy accuracy
    # near convergence.
    imitated = ipa.spread_to_tokens(batch.il_mask, batch.chunk_ids)
    right = jnp.where(imitated & (logp > jnp.log(0.5)), 1.0, 0.0).sum()
    return total / weight, {"loss": total / weight, "accuracy": right / weight}

  return jax.grad(loss_fn, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=0)
def _apply(
  optimizer: optax.GradientTransformation, state: TrainState, grads: chex.ArrayTree
) -> tuple[TrainState, chex.Array]:
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  state = dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1)
  return state, optax.tree.norm(grads)


_totals = jax.jit(ipa.loss_totals, static_argnums=1)
_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))


def _update(
  optimizer: optax.GradientTransformation,
  state: TrainState,
  micro_batches: Sequence[ipa.ChunkBatch],
  grad_fn: Callable[[chex.ArrayTree, ipa.ChunkBatch], tuple[chex.ArrayTree, Metrics]],
) -> tuple[TrainState, dict[str, float]]:
  """Sums gradients and metrics of the micro-batches, checks them, applies the optimiser."""
  grads, stacked = None, []
  for batch in micro_batches:
    part, metrics = grad_fn(state.params, batch)
    grads = part if grads is None else _add(grads, part)
    stacked.append(metrics)
  metrics = ipa.reduce_metrics(jax.tree.map(lambda *xs: jnp.stack(xs), *stacked))
  new_state, norm = _apply(optimizer, state, grads)
  metrics = {k: float(v) for k, v in metrics.items()} | {"grad_norm": float(norm)}
  bad = [k for k, v in metrics.items() if not jnp.isfinite(v)]
  if bad:
    raise FloatingPointError(
      f"update {int(state.step)}: {', '.join(bad)} not finite; the update was not applied. "
      "Lower the learning rate or resume from an earlier checkpoint"
    )
  return new_state, metrics


def _split(batch: ipa.ChunkBatch, rows: int) -> list[ipa.ChunkBatch]:
  return [
    jax.tree.map(lambda x, i=i: x[i : i + rows], batch) for i in range(0, len(batch.tokens), rows)
  ]


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
) -> tuple[TrainState, dict[str, float]]:
  """One IPA update (Eqs. 9-10).

  Args:
    state: before the update.
    batch: rows a multiple of `micro_rows`.
    config: the model's sizes.
    sampling: the settings that the batch was sampled under.
    ipa_config: the loss.
    optimizer: the one that made `state.opt_state`.
    micro_rows: rows a micro-batch.
    num_trajectories: static upper bound on the batch's trajectory ids + 1.
  Returns:
    The next state, and metrics of `ipa.ipa_loss` with `loss`, `entropy` and the unclipped
    `grad_norm`.
  Raises:
    FloatingPointError: something was not finite; nothing was updated.
  """
  micro = _split(batch, micro_rows)
  totals = functools.reduce(_add, [_totals(m, num_trajectories) for m in micro])
  return _update(
    optimizer,
    state,
    micro,
    lambda params, m: _ipa_grad(config, sampling, ipa_config, params, m, totals),
  )


def sft_step(
  state: TrainState,
  batch: ipa.ChunkBatch,
  *,
  config: models.ModelConfig,
  optimizer: optax.GradientTransformation,
  micro_rows: int,
) -> tuple[TrainState, dict[str, float]]:
  """One supervised update (Eq. 1) on the chunks that `batch.il_mask` marks.

  Arguments as in `ipa_step`.
  """
  micro = _split(batch, micro_rows)
  sampling = models.Sampling()
  weight = max(sum(float(_totals(m, 1).il.tokens) for m in micro), 1.0)
  return _update(
    optimizer, state, micro, lambda params, m: _sft_grad(config, sampling, params, m, weight)
  )
