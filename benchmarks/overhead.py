"""What a trainer costs beside its device work: host time between programs, and a bare jitted step.

  python -m benchmarks.overhead

For each preset and stage one JSON line. An *update* is all that the loop does for one: choose, pack
(`Learner`), step, read the metrics, write their row. The *bare* step has the same arrays, on the
device already, and the counts that the loss divides by: a jitted gradient, added to the sum within
the program, for each micro-batch, then jitted AdamW, sums and state in place; no metrics, nothing
read. The two take turns, `--repeats` times; `tokens_to_bare` (tokens trained a second by the loop
over those of the bare step) is the median of the pairs.

`host_share` is the share of an update's time in which no program runs, by the profiler's intervals
of execution, the median of `--profiled` updates. CPUs only: elsewhere the profiler names programs
otherwise. Trajectories are random, with lengths like the quickstart's. About five minutes on two
cores.
"""

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from experiments import memory
from experiments.configs import quickstart
from rome import ipa, models, rollout
from rome.train import config as config_lib
from rome.train import state as state_lib
from rome.train import summary
from rome.train.learner import Learner
from rome.train.metrics import MetricsWriter
from rome.trajectory import Trajectory, Valid

_PRESETS = flags.DEFINE_list("presets", ["tiny", "bench_small"], "Models.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed updates of each kind.", lower_bound=1)
_PROFILED = flags.DEFINE_integer("profiled", 3, "Updates under the profiler.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of parameters and trajectories.")

STAGES = ("sft", "rl")
# Trajectories, experts, rows a device call; of the larger model, what two cores do in seconds.
SHAPES = {"tiny": (64, 96, 8)}
OTHER_SHAPE = (3, 3, 1)


def settings(preset: str) -> config_lib.RunConfig:
  """The quickstart's, on another model and with as many trajectories as it can train on."""
  config = config_lib.from_config_dict(quickstart.get_config())
  batch, experts, micro_rows = SHAPES.get(preset, OTHER_SHAPE)
  rl = dataclasses.replace(config.rl, batch=batch, micro_rows=micro_rows)
  sft_batch = config.sft.batch if preset in SHAPES else batch + experts
  sft = dataclasses.replace(config.sft, batch=sft_batch, micro_rows=micro_rows)
  experts = dataclasses.replace(config.experts, batch=experts)
  return dataclasses.replace(
    config, model=preset, seed=_SEED.value, rl=rl, sft=sft, experts=experts
  )


def trajectory(n: int) -> Trajectory:
  """Episode n: two turns, 56 to 140 tokens."""
  rng = np.random.default_rng((_SEED.value, n))
  call_ids = np.concatenate(
    [np.repeat([-1, k], rng.integers([16, 12], [41, 31])) for k in range(2)]
  ).astype(np.int32)
  return Trajectory(
    id=f"t{n}#0",
    task_id=f"t{n}",
    family="f",
    instruction="",
    tokens=rng.integers(0, 256, len(call_ids)).astype(np.int32),
    call_ids=call_ids,
    logps=np.where(call_ids >= 0, -5.6, 0).astype(np.float32),
    versions=np.zeros(2, np.int32),
    chunk_rewards=np.zeros(2, np.float32),
    reward=Valid(float(n % 2)),
    end_reason="submitted",
    turns=(),
  )


def bare_step(
  config: config_lib.RunConfig, stage: str, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
  """(params, opt_state, micro-batches, totals) -> (params, opt_state)."""
  model = models.PRESETS[config.model]

  def loss(params: Any, batch: ipa.ChunkBatch, totals: ipa.Totals) -> jax.Array:
    hidden, _ = models.hidden_states(
      model, params, batch.tokens, batch.segment_ids, batch.positions
    )
    kernel, tied = models.head_kernel(model, params), model.tie_word_embeddings
    logp, entropy = models.head_logps(hidden, kernel, batch.tokens, models.Sampling(), tied)
    if stage == "sft":
      return ipa.sft_loss(logp, batch.chunk_ids, batch.il_mask)[0] / totals.il.tokens
    return ipa.ipa_loss(logp, batch, config.ipa, totals, entropy)[0]

  @functools.partial(jax.jit, donate_argnums=3)
  def add(params: Any, batch: ipa.ChunkBatch, totals: ipa.Totals, grads: Any) -> Any:
    return jax.tree.map(jnp.add, grads, jax.grad(loss)(params, batch, totals))

  @functools.partial(jax.jit, donate_argnums=(1, 2))
  def apply(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  def step(
    params: Any, opt_state: Any, batches: Sequence[ipa.ChunkBatch], totals: ipa.Totals
  ) -> tuple[Any, Any]:
    grads = jax.tree.map(jnp.zeros_like, params)
    for batch in batches:
      grads = add(params, batch, totals, grads)
    return apply(params, opt_state, grads)

  return step


def host_shares(directory: str, update: Callable[[], Any]) -> list[float]:
  """Of each profiled call, the share of its time in which no program was running."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with jax.profiler.trace(directory, profiler_options=options):
    for _ in range(_PROFILED.value):
      with jax.profiler.TraceAnnotation("whole update"):
        update()
  (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
  found = [
    (event.name, event.start_ns, event.start_ns + event.duration_ns)
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes
    for line in plane.lines
    for event in line.events
    if event.name == "whole update" or event.name.startswith("ThunkExecutor::Execute")
  ]
  running = sorted((start, end) for name, start, end in found if name != "whole update")
  return [_idle(start, end, running) for name, start, end in found if name == "whole update"]


def _idle(start: float, end: float, running: Sequence[tuple[float, float]]) -> float:
  """Share of [start, end] outside all intervals, which are sorted."""
  idle, at = 0.0, start
  for begins, ends in running:
    if start <= begins < end:
      idle += max(begins - at, 0.0)
      at = max(at, ends)
  return (idle + max(end - at, 0.0)) / (end - start)


def measure(preset: str, stage: str) -> dict[str, Any]:
  config = settings(preset)
  learner = Learner(config)
  rl = stage == "rl"
  batch, experts, micro_rows = config.rl.batch, config.experts.batch, config.rl.micro_rows
  made = [trajectory(n) for n in range(batch + experts)]
  demos = [trajectory(n) for n in range(config.sft.batch)]
  whole = rollout.pack(
    made[:batch] if rl else [], config.ipa, 0, row_length=config.row_length,
    max_chunks=config_lib.chunk_slots(config.row_length), rows_multiple=micro_rows, pad=0,
    experts=made[batch:] if rl else demos,
  )  # fmt: skip
  cut = range(0, len(whole.tokens), micro_rows)
  batches = [jax.tree.map(lambda x, i=i: x[i : i + micro_rows], whole) for i in cut]
  arrays = jax.device_put((batches, ipa.loss_totals(whole, batch + experts)))
  optimizer = state_lib.make_optimizer(config.rl if rl else config.sft)
  bare = bare_step(config, stage, optimizer)
  state = learner.fresh()
  params, opt_state = jax.tree.map(jnp.copy, (state.params, optimizer.init(state.params)))
  if rl:
    state = learner.reinforcing(state)
  seconds: dict[str, list[float]] = {"update": [], "bare": []}
  with tempfile.TemporaryDirectory(prefix="rome-bench-") as directory:
    with MetricsWriter(directory) as writer:

      def update() -> None:
        nonlocal state
        if rl:
          state, row, tokens = learner.reinforce(state, made[:batch], made[batch:], 0)
        else:
          state, row, tokens = learner.imitate(state, demos, 0)
        writer.write(stage, len(seconds["update"]), row | {"tokens": tokens})
        jax.block_until_ready(state.params)

      for turn in range(_REPEATS.value + 1):  # the first compiles
        started = time.perf_counter()
        update()
        between = time.perf_counter()
        params, opt_state = jax.block_until_ready(bare(params, opt_state, *arrays))
        if turn:
          seconds["update"].append(between - started)
          seconds["bare"].append(time.perf_counter() - between)
      shares = host_shares(directory, update)
  median = {name: statistics.median(s) for name, s in seconds.items()}
  ratios = [b / u for u, b in zip(seconds["update"], seconds["bare"], strict=True)]
  tokens = int(np.count_nonzero(whole.segment_ids))
  return {
    "benchmark": "overhead",
    "preset": preset,
    "stage": stage,
    "rows": len(whole.tokens),
    "micro_rows": micro_rows,
    "row_length": config.row_length,
    "tokens": tokens,
    "update_s": round(median["update"], 4),
    "bare_s": round(median["bare"], 4),
    "tokens_per_s": round(tokens / median["update"], 1),
    "tokens_to_bare": round(statistics.median(ratios), 4),
    "host_share": round(statistics.median(shares), 5),
    "host_shares": [round(x, 5) for x in shares],
    "seconds": {name: [round(x, 4) for x in s] for name, s in seconds.items()},
  }


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}")
  memory.keep_freed_memory()
  jax.config.update("jax_cpu_enable_async_dispatch", False)  # as runs do
  for preset in _PRESETS.value:
    for stage in STAGES:
      row = measure(preset, stage) | {"seed": _SEED.value, "repeats": _REPEATS.value}
      row |= summary.provenance() | {"load_1min": round(os.getloadavg()[0], 2)}
      print(json.dumps(row), flush=True)


if __name__ == "__main__":
  app.run(main)
