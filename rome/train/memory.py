"""What a run will need of memory, from its own programs as the compiler has them.

The programs are compiled for abstract arrays of the very shapes, and jax keeps them, so that the
run does not compile them again. Nothing is allocated. Left out: what environments, the report and
Python itself take, and the programs of generation, whose temporaries are small beside the rest.
`rome plan` is for devices that are not at hand.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rome import ipa, models
from rome.models import balance
from rome.train import optimise, play, start
from rome.train import state as state_lib
from rome.train import step as step_lib
from rome.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Program:
  """Bytes that one compiled program takes on a device.

  Attributes:
    name: which one.
    arguments, outputs, temporaries: as the compiler says.
  """

  name: str
  arguments: int
  outputs: int
  temporaries: int


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
  """Bytes.

  Attributes:
    params, optimizer: what is trained, and its moments.
    resident: of the moments, what is counted here all the time: with `offload_optimizer` nothing,
      but on a processor, whose memory is the host's.
    piece: of moments in host memory, what an update has on the device at once; else 0.
    kept: weights of earlier versions, for old log-probs (`rl.max_staleness`).
    engine_weights: the engine's own copy of the weights, on a device that generates.
    engine_cache: its pages there.
    programs: of the stages that the run has.
    limit: of the device, or of the machine's memory where the device is its processor.
  """

  params: int
  optimizer: int
  resident: int
  piece: int
  kept: int
  engine_weights: int
  engine_cache: int
  programs: tuple[Program, ...]
  limit: int | None

  @property
  def peak(self) -> int:
    """All that lies there for long, and the most that an update takes beside it.

    A gradient is kept while the next micro-batch's is computed; the optimiser makes new weights in
    its place, and its own state anew in place.
    """
    held = self.params + self.resident + self.kept + self.engine_weights + self.engine_cache
    beside = [p.temporaries + p.outputs + self.params for p in self.programs]
    return held + max([*beside, self.params + self.piece if beside else 0])

  def lines(self) -> list[str]:
    """For people: one line of what lies there, one of what is computed."""
    of = f" of {_mib(self.limit)}" if self.limit else ""
    fits = "  DOES NOT FIT" if self.limit and self.peak > self.limit else ""
    moments = f"{_mib(self.optimizer)}{' in host memory' if self.piece else ''}"
    older = f"older weights {_mib(self.kept)}, " if self.kept else ""
    first = (
      f"memory: about {_mib(self.peak)}{of}{fits}: weights {_mib(self.params)}, "
      f"optimiser {moments}, {older}engine {_mib(self.engine_weights)} of weights and "
      f"{_mib(self.engine_cache)} of cache"
    )
    parts = [
      f"{p.name} {_mib(p.arguments)} in, {_mib(p.outputs)} out, {_mib(p.temporaries)} beside"
      for p in self.programs
    ]
    return [first, f"memory of programs: {'; '.join(parts)}"] if parts else [first]


def memory_plan(config: RunConfig) -> MemoryPlan:
  """Compiles the gradients of a run's stages for abstract arrays and reads what they need.

  Raises:
    ConfigError, CustomError: the model, the estimator or the devices cannot be had.
  """
  model = start.model_of(config)
  fresh = functools.partial(
    state_lib.init_state, model, state_lib.make_optimizer(config.rl), 0, adapters=config.lora
  )
  state = jax.eval_shape(fresh)
  params = state.params
  weights, cache = play.make_engines(config, model).memory(params)
  if config.offload_optimizer:  # then the run's are committed, which are other arguments for jit
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), params)
  moments, away = nbytes(state.opt_state), config.offload_optimizer
  apart = jax.devices()[0].platform != "cpu"
  return MemoryPlan(
    params=nbytes(state.params),
    optimizer=moments,
    resident=0 if away and apart else moments,
    piece=optimise.piece_bytes(state.params, state.opt_state) if away else 0,
    kept=_versions(config) * nbytes(state.params),
    engine_weights=weights,
    engine_cache=cache,
    programs=tuple(_read(name, program) for name, program in _gradients(config, params)),
    limit=_limit(),
  )


def nbytes(tree: chex.ArrayTree) -> int:
  """Bytes of arrays, abstract ones too."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _gradients(config: RunConfig, params: chex.ArrayTree) -> Iterator[tuple[str, Any]]:
  """Name and lowered program of the gradient of a micro-batch, for each stage of the run.

  The arguments are those of `rome.train.step`.
  """
  model = start.model_of(config)
  weights = models.RouterLoss(balance=config.router_balance_weight, z=config.router_z_weight)
  if config.sft.steps:
    batch = start.empty_batch(config, config.sft.micro_rows)
    router = _router_totals(model, weights, batch, config.sft.batch)
    tokens = jax.ShapeDtypeStruct((), jnp.float32)
    args = (model, models.Sampling(), weights, params, batch, tokens, router)
    yield "supervised gradient", step_lib.sft_grad.lower(*args)
  if config.rl.steps:
    batch = start.empty_batch(config, config.rl.micro_rows)
    if config.rl.rescored:
      batch = dataclasses.replace(batch, old_logp=batch.behavior_logp)
    router = _router_totals(model, weights, batch, config.rl.batch)
    count = config.rl.batch + config.experts.batch
    totals = jax.eval_shape(lambda b: ipa.loss_totals(b, count), batch)
    static = (model, config.sampling, config.numerics, config.ipa, weights)
    program = step_lib.IPA_GRAD[config.numerics]
    yield (
      "policy gradient",
      program.lower(*static, start.estimator_of(config), params, batch, totals, router),
    )


def _versions(config: RunConfig) -> int:
  """Earlier versions of the weights that are kept."""
  return config.rl.max_staleness if config.rl.old_logp_source == "kept_weights" else 0


def _router_totals(
  model: models.ModelConfig, weights: models.RouterLoss, batch: ipa.ChunkBatch, rows: int
) -> balance.RouterTotals:
  sparse = sum(model.is_sparse(i) for i in range(model.num_hidden_layers))
  several = weights.balance and sparse and rows > len(batch.tokens)
  load: Any = jax.ShapeDtypeStruct((sparse, model.num_experts), jnp.float32) if several else None
  return balance.RouterTotals(rows=jax.ShapeDtypeStruct((), jnp.float32), load=load)


def _read(name: str, lowered: Any) -> Program:
  stats = lowered.compile().memory_analysis()
  names = ("argument", "output", "temp")
  return Program(name, *(getattr(stats, f"{part}_size_in_bytes") for part in names))


def _limit() -> int | None:
  """Bytes of the first device; None where it does not tell."""
  device = jax.devices()[0]
  if device.platform == "cpu":
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return (device.memory_stats() or {}).get("bytes_limit")


def _mib(size: int) -> str:
  return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
