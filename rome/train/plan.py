"""Will it fit, and how fast at best: the train and decode steps compiled for devices not at hand.

A TPU slice is described, not present: libtpu compiles for it on any machine, and no array is ever
made. What is compiled is the whole update (gradient, clipping, AdamW, donated state) of one
micro-batch of IPA, and one token of generation in each row of a full cache. With moments in host
memory the update is two programs, as in a run: the gradient, and the optimiser of the largest
layer. Memory is the larger of the two, work that of the gradient.

The memory is the compiler's own account, and where a program does not fit it is the compiler that
says so. The time is a bound: the slowest of computing, moving memory and talking to neighbours,
each at the speed of the data sheet and all at once. Nothing is run. Left out: hosts, networks
between slices, reading weights, waiting for environments.
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from rome import ipa, models
from rome.models import sharding
from rome.models.config import ROW_COMPUTE
from rome.train import chips, flops, hlo, optimise
from rome.train.config import StageConfig, chunk_slots
from rome.train.state import TrainState, make_optimizer

STEPS = ("train", "decode")
_SAMPLING = models.Sampling()
_IPA = ipa.IPAConfig()
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# libtpu refuses in two ways: before it schedules a program, and after.
_SIZE = r"([\d.]+)([KMGT]?)"
_TOO_LARGE = (
  re.compile(rf"temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
  re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)


@dataclasses.dataclass(frozen=True)
class Request:
  """What to plan.

  Attributes:
    config: the model's sizes.
    topology: the devices.
    mesh: sizes of mesh axes, as `sharding.make_mesh` takes them; see `default_mesh`.
    batch: rows of a micro-batch, and rows that generate at once.
    length: tokens of a row, and places of a cache.
    dtype: `Compute.dtype`; generation keeps weights and cache in it.
    remat: `Compute.remat`.
    offload: `RunConfig.offload_optimizer`.
  """

  config: models.ModelConfig
  topology: chips.Topology
  mesh: dict[str, int]
  batch: int
  length: int
  dtype: str = "bfloat16"
  remat: str = "layer"
  offload: bool = False

  def compute(self, step: str) -> models.Compute:
    """How the model is evaluated: on TPUs with their kernels; generation as the engine does."""
    if step == "decode":
      return dataclasses.replace(ROW_COMPUTE, dtype=self.dtype)
    on_tpu, split = self.topology.chip is not None, self.mesh.get("context", 1) > 1
    return models.Compute(
      dtype=self.dtype,
      experts="megablox" if on_tpu else "padded",
      # Rows split over devices attend in a ring, which is no kernel's business.
      attention="splash" if on_tpu and not split else "auto",
      remat=self.remat,
    )


def default_mesh(devices: int, batch: int) -> dict[str, int]:
  """fsdp over as many devices as split the rows, context over the rest."""
  fsdp = max(n for n in range(1, devices + 1) if devices % n == 0 and batch % n == 0)
  return {"fsdp": fsdp, "context": devices // fsdp}


def make_mesh(request: Request) -> Mesh:
  """The mesh of a request, checked against its model and batch.

  Raises:
    ValueError: names what does not divide, or a slice that does not exist.
  """
  mesh = sharding.make_mesh(**{"fsdp": 1} | request.mesh, devices=chips.devices(request.topology))
  sharding.check_mesh(request.config, mesh, request.batch, request.length)
  sharding.param_shardings(mesh, _shapes(request.config))
  return mesh


# --- the programs --------------------------------------------------------------------------------


def train_gradient(request: Request, params: dict, batch: Any) -> tuple[dict, dict]:
  """The gradient of a single micro-batch, and its metrics."""
  totals = ipa.loss_totals(batch, request.batch)

  def loss_fn(params: chex.ArrayTree) -> tuple[chex.Array, dict]:
    hidden, _ = models.hidden_states(
      request.config,
      params,
      batch.tokens,
      batch.segment_ids,
      batch.positions,
      request.compute("train"),
    )
    kernel = models.head_kernel(request.config, params)
    tied = request.config.tie_word_embeddings
    logp, entropy = models.head_logps(hidden, kernel, batch.tokens, _SAMPLING, tied)
    return ipa.ipa_loss(logp, batch, _IPA, totals, entropy)

  return jax.grad(loss_fn, has_aux=True)(params)


def train_step(
  request: Request, optimizer: optax.GradientTransformation, state: TrainState, batch: Any
) -> tuple[TrainState, dict[str, chex.Array]]:
  """One update of a single micro-batch: what `rome.train.step.ipa_step` does in several calls."""
  grads, metrics = train_gradient(request, state.params, batch)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  state = dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1)
  return state, metrics | {"grad_norm": optax.tree.norm(grads)}


def decode_step(
  request: Request, params: dict, cache: models.Cache, logits: chex.Array, key: chex.PRNGKey
) -> tuple[models.Cache, chex.Array, chex.Array]:
  """Draws a token for each row and appends it to the cache: cache, next logits, tokens [B]."""
  logp = models.distribution(logits, _SAMPLING)
  tokens = jax.random.categorical(key, logp).astype(jnp.int32)
  logits, cache, _ = models.extend(
    request.config,
    params,
    cache,
    tokens[:, None],
    jnp.ones_like(tokens),
    request.compute("decode"),
  )
  return cache, logits, tokens


def _abstract(tree: chex.ArrayTree, shardings: chex.ArrayTree) -> chex.ArrayTree:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )


def _params(config: models.ModelConfig) -> dict:
  return models.stack_layers(config, models.init_params(config, jax.random.key(0)))


def _shapes(config: models.ModelConfig) -> dict:
  return jax.eval_shape(functools.partial(_params, config))


def _batch(rows: int, length: int) -> ipa.ChunkBatch:
  tokens = jnp.zeros((rows, length), jnp.int32)
  chunks = jnp.zeros((rows, chunk_slots(length)), jnp.int32)
  return ipa.ChunkBatch(
    tokens=tokens,
    segment_ids=tokens,
    positions=tokens,
    chunk_ids=tokens,
    old_logp=None,
    behavior_logp=tokens.astype(jnp.float32),
    returns=chunks.astype(jnp.float32),
    positive=chunks.astype(bool),
    il_mask=chunks.astype(bool),
    trajectory_ids=chunks,
    group_ids=chunks,
    versions=chunks,
  )


def _train_program(request: Request, mesh: Mesh) -> tuple[Any, dict[str, float]]:
  optimizer = make_optimizer(StageConfig(steps=1, batch=request.batch, learning_rate=1e-5))

  def init() -> TrainState:
    params = _params(request.config)
    zero, key = jnp.zeros((), jnp.int32), jax.random.key(0)
    return TrainState(params=params, opt_state=optimizer.init(params), step=zero, key=key)

  shapes = jax.eval_shape(init)
  whole = NamedSharding(mesh, sharding.spec())
  places = dataclasses.replace(
    shapes,
    params=sharding.param_shardings(mesh, shapes.params),
    opt_state=sharding.param_shardings(mesh, shapes.opt_state),
    step=whole,
    key=whole,
  )
  state = _abstract(shapes, places)
  rows = jax.eval_shape(lambda: _batch(request.batch, request.length))

  def place(x: jax.ShapeDtypeStruct) -> NamedSharding:
    length = "length" if x.shape[1] == request.length else None
    return NamedSharding(mesh, sharding.spec("batch", length))

  batch = _abstract(rows, jax.tree.map(place, rows))
  if request.offload:
    gradient = functools.partial(train_gradient, request)
    program = jax.jit(gradient, out_shardings=(places.params, None)).trace(state.params, batch)
    return program, {"params": _held(state.params)}
  step = functools.partial(train_step, request, optimizer)
  program = jax.jit(step, donate_argnums=0, out_shardings=(places, None)).trace(state, batch)
  held = {"params": _held(state.params), "optimizer": _held(state.opt_state)}
  return program, held


def _update_program(request: Request, mesh: Mesh) -> tuple[Any, dict[str, float]]:
  """The optimiser of the largest piece, as a run has its layers, with moments in host memory."""
  optimizer = make_optimizer(StageConfig(steps=1, batch=request.batch, learning_rate=1e-5))
  shapes = jax.eval_shape(lambda: models.init_params(request.config, jax.random.key(0)))
  params = _abstract(shapes, sharding.param_shardings(mesh, shapes))
  moments = jax.eval_shape(optimizer.init, shapes)
  places = jax.tree.map(
    lambda x, s: s.with_memory_kind(optimise.HOST) if x.ndim else s,
    moments,
    sharding.param_shardings(mesh, moments),
  )
  opt_state = _abstract(moments, places)
  norm = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, sharding.spec()))
  found = optimise.pieces(optimizer, params, opt_state, params, norm)
  _, program, piece = max(found, key=lambda each: _held(each[2]))
  return program.trace(*piece), {"params": _held(params), "optimizer": _held(opt_state)}


def _decode_program(request: Request, mesh: Mesh) -> tuple[Any, dict[str, float]]:
  config, dtype = request.config, request.dtype
  shapes = jax.eval_shape(lambda: jax.tree.map(lambda x: x.astype(dtype), _params(config)))
  params = _abstract(shapes, sharding.param_shardings(mesh, shapes))
  empty = jax.eval_shape(
    lambda: models.init_cache(config, request.batch, request.length, stacked=True, dtype=dtype)
  )
  axes = {1: ("batch",), 4: ("batch", None, "kv_heads", None)}
  axes[5] = (None, *axes[4])

  def place(*names: str | None) -> NamedSharding:
    return NamedSharding(mesh, sharding.spec(*names))

  cache = _abstract(empty, jax.tree.map(lambda x: place(*axes[x.ndim]), empty))
  logits = jax.ShapeDtypeStruct(
    (request.batch, config.vocab_size), jnp.float32, sharding=place("batch", "vocab")
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=place())
  outs = (jax.tree.map(lambda x: x.sharding, cache), logits.sharding, place("batch"))
  step = functools.partial(decode_step, request)
  program = jax.jit(step, donate_argnums=(1, 2), out_shardings=outs).trace(
    params, cache, logits, key
  )
  return program, {"params": _held(params), "cache": _held(cache)}


def _held(tree: chex.ArrayTree) -> float:
  """Bytes of the leaves that one device holds."""
  return float(
    sum(
      x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
    )
  )


# --- what the compiler says ----------------------------------------------------------------------


def plan_step(request: Request, mesh: Mesh, step: str) -> dict[str, Any]:
  """Compiles one step and reads what it needs.

  Args:
    request: what to plan.
    mesh: `make_mesh(request)`.
    step: "train" or "decode".
  Returns:
    a JSON-ready dict: `fits`, `memory` (bytes a device), `flops` (of all devices), `traffic` (bytes
    a device), `collectives` by kind and `roofline`; only the first two where it does not fit.
  """
  make: Callable = {"train": _train_program, "decode": _decode_program}[step]
  start = time.perf_counter()
  platform = "tpu" if request.topology.chip else "cpu"
  with jax.set_mesh(mesh):
    program, held = make(request, mesh)
    lowered = program.lower(lowering_platforms=(platform,))
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      found = next((f for p in _TOO_LARGE if (f := p.search(str(error)))), None)
      if not found:
        raise
      used, limit = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
      seconds = time.perf_counter() - start
      memory = {"held": held, "peak": used, "limit": limit}
      return {"fits": False, "compile_seconds": round(seconds, 1), "memory": memory}
    memory = _memory(request.topology, compiled) | {"held": held}
    fits = True
    if step == "train" and request.offload:
      memory |= _with_update(request, mesh, platform, memory)
      fits = memory["limit"] is None or memory["update"] <= memory["limit"]
  seconds = time.perf_counter() - start
  report: dict[str, Any] = {"fits": fits, "compile_seconds": round(seconds, 1), "memory": memory}
  return report | _work(request, step, compiled)


def _with_update(
  request: Request, mesh: Mesh, platform: str, gradient: dict[str, Any]
) -> dict[str, float]:
  """Bytes a device: "update" while the optimiser runs, "peak", and "host", what lies there."""
  program, held = _update_program(request, mesh)
  compiled = program.lower(lowering_platforms=(platform,)).compile()
  sizes = _memory(request.topology, compiled)
  # Old weights, and new ones in the place of the gradient; beside them one piece.
  update = 2 * held["params"] + sizes["temp"] + sizes["generated_code"]
  return {"update": update, "peak": max(update, gradient["peak"]), "host": held["optimizer"]}


def _memory(topology: chips.Topology, compiled: Any) -> dict[str, Any]:
  stats = compiled.memory_analysis()
  names = ("argument", "output", "alias", "temp", "generated_code")
  sizes = {name: getattr(stats, f"{name}_size_in_bytes") for name in names}
  # Choice: all that is set aside, as a process needs it; `peak_memory_in_bytes`, what is ever in
  # use at once, leaves out gaps on TPUs and temporaries on CPUs.
  peak = sum(sizes.values()) - 2 * sizes["alias"]
  return sizes | {"peak": peak, "limit": topology.chip.hbm_bytes if topology.chip else None}


def _work(request: Request, step: str, compiled: Any) -> dict[str, Any]:
  count, chip = request.topology.count, request.topology.chip
  if step == "train":
    tokens = request.batch * request.length
    model, machine = flops.train_flops(request.config, request.batch, request.length, request.remat)
  else:
    tokens = request.batch
    dense = request.compute(step).experts == "dense"
    model, machine = flops.decode_flops(request.config, request.batch, request.length, dense)
  program = hlo.Program(compiled.as_text(), count)
  collectives = program.collectives()
  costs = compiled.cost_analysis() or {}
  out: dict[str, Any] = {
    "flops": {"model": model, "machine": machine, "xla_per_device": costs.get("flops")},
    "traffic": {
      "memory": program.memory_bytes(),
      "network": sum(t.sent for t in collectives.values()),
      "xla_memory": costs.get("bytes accessed"),
    },
    "collectives": {kind: dataclasses.asdict(t) for kind, t in collectives.items()},
    "roofline": None,
  }
  if chip:
    seconds = {
      "compute": machine / count / chip.flops,
      "memory": out["traffic"]["memory"] / chip.hbm_rate,
      "network": out["traffic"]["network"] / chip.ici_rate,
    }
    bound = max(seconds, key=seconds.__getitem__)
    total = seconds[bound]
    out["roofline"] = {
      "seconds": seconds,
      "bound": bound,
      "tokens_per_second": tokens / total,
      "mfu": model / (count * chip.flops * total),
    }
  return out


def plan(
  request: Request, steps: Sequence[str] = STEPS, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
  """Plans the steps of a request, on a mesh checked before anything is compiled.

  Args:
    request: what to plan.
    steps: some of STEPS.
    say: told what is being compiled.
  Returns:
    a JSON-ready dict; `steps` has a `plan_step` for each, with its shape.
  Raises:
    ValueError: see `make_mesh`.
  """
  mesh = make_mesh(request)
  found = {}
  for step in steps:
    say(f"compiling the {step} step for {request.topology.name}")
    shape = {"rows": request.batch, "length": request.length}
    found[step] = shape | plan_step(request, mesh, step)
  return {
    "topology": request.topology.name,
    "devices": request.topology.count,
    "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
    "batch": request.batch,
    "length": request.length,
    "compute": {step: dataclasses.asdict(request.compute(step)) for step in steps},
    "parameters": sum(x.size for x in jax.tree.leaves(_shapes(request.config))),
    "active_parameters": flops.layer_parameters(request.config)
    + flops.head_parameters(request.config),
    "steps": found,
  }
