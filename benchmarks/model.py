"""Speed and memory of the model on this machine, beside transformers; one JSON line a measure.

  scripts/setup_peers.sh        # once: .peers with torch and transformers; without it, no peers
  python -m benchmarks.model [--preset=bench_small] [--rounds=3]

Measures: the forward pass (all logits) and the training step (mean next-token loss, gradient,
AdamW), float32, at each of `--shapes`. Every measure is a process of its own, ours and theirs in
turn, `--rounds` times; `tokens_per_s` is from the median of all timed calls, `ratio` is ours to the
fastest peer, `memory_ratio` ours to the leanest of that measure. `peak_share` is the share of the
speed of one square product in the same dtype, measured in our own process of the same round: 2048^3
on a CPU, 8192^3 on an accelerator.

On an accelerator, without peers:

  python -m benchmarks.model --peers= --preset=dense_1b --shapes=4x4096 --modes=train \
    --dtype=bfloat16 --attention=cudnn --remat=layer --stacked
"""

import functools
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from experiments import memory
from rome import models
from rome.models import hf_config
from rome.train import summary

_PRESET = flags.DEFINE_string("preset", "bench_small", "Model.")
_SHAPES = flags.DEFINE_list("shapes", ["4x512", "1x2048"], "Rows x tokens.")
_MODES = flags.DEFINE_list("modes", ["forward", "train"], "What is timed.")
_PEERS = flags.DEFINE_list(
  "peers", ["eager", "grouped_mm", "grouped_mm+compile"], "transformers' experts."
)
_ROUNDS = flags.DEFINE_integer("rounds", 1, "Processes of each.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 6, "Timed calls a process.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", models.config.COMPUTE_TYPES, "Of the products.")
_EXPERTS = flags.DEFINE_enum("experts", "padded", models.config.EXPERTS, "Implementation.")
_ATTENTION = flags.DEFINE_enum("attention", "auto", models.config.ATTENTION, "Implementation.")
_REMAT = flags.DEFINE_enum("remat", "none", models.config.REMAT, "What is computed again.")
_STACKED = flags.DEFINE_bool("stacked", False, "Layers in one scan.")
_SETTINGS = (_PRESET, _REPEATS, _STACKED, _DTYPE, _EXPERTS, _ATTENTION, _REMAT)
_CHILD = flags.DEFINE_string("child", "", "Internal: MODE:ROWSxTOKENS to measure in this process.")

ROOT = pathlib.Path(__file__).parents[1]
PEER_PYTHON = ROOT / ".peers" / "bin" / "python"


def product_flops(config: models.ModelConfig, tokens: int) -> float:
  """Floating point operations a token of the forward pass: matrix products of visited weights.

  Attention counts the scores that are not masked: (tokens + 1) / 2 keys a query.
  """
  c = config
  heads = c.num_attention_heads + c.num_key_value_heads
  projections = 2 * c.hidden_size * c.head_dim * heads
  scores = c.num_attention_heads * c.head_dim * (tokens + 1)
  total = c.hidden_size * c.vocab_size
  for i in range(c.num_hidden_layers):
    mlp = 3 * c.hidden_size * c.intermediate_size
    if c.is_sparse(i):
      mlp = c.hidden_size * (c.num_experts + 3 * c.num_experts_per_tok * c.moe_intermediate_size)
    total += projections + scores + mlp
  return 2.0 * total


def _timed(call: Callable[[], Any], repeats: int) -> list[float]:
  seconds = []
  for _ in range(repeats + 2):
    start = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - start)
  return seconds[2:]


def _step_of(config: models.ModelConfig, mode: str, rows: int, tokens: int) -> Callable[[], Any]:
  """A call that does the work once; training keeps its state between calls."""
  params = jax.jit(models.init_params, static_argnums=0)(config, jax.random.key(0))
  if _STACKED.value:
    params = jax.jit(models.stack_layers, static_argnums=0, donate_argnums=1)(config, params)
  ids = np.random.default_rng(0).integers(0, config.vocab_size, (rows, tokens)).astype(np.int32)
  places = np.broadcast_to(np.arange(tokens, dtype=np.int32)[None], ids.shape)
  batch = jax.device_put((ids, np.ones_like(ids), places))
  compute = models.Compute(_DTYPE.value, _EXPERTS.value, _ATTENTION.value, _REMAT.value)
  if mode == "train":
    return _training(config, compute, params, batch)
  forward = jax.jit(models.forward, static_argnums=(0, 5))
  return lambda: forward(config, params, *batch, compute)


def _training(
  config: models.ModelConfig, compute: models.Compute, params: Any, batch: tuple
) -> Callable[[], Any]:
  optimizer = optax.adamw(1e-4)

  def loss_fn(params: Any, ids: jax.Array, segments: jax.Array, places: jax.Array) -> jax.Array:
    hidden, _ = models.hidden_states(config, params, ids, segments, places, compute)
    head, tied = models.head_kernel(config, params), config.tie_word_embeddings
    logp, _ = models.head_logps(hidden, head, ids, models.Sampling(), tied)
    return -logp[:, 1:].mean()

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, moments: Any, batch: tuple) -> tuple[Any, Any, jax.Array]:
    loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
    updates, moments = optimizer.update(grads, moments, params)
    return optax.apply_updates(params, updates), moments, loss

  state = [params, jax.jit(optimizer.init)(params)]

  def call() -> jax.Array:
    *state[:], loss = step(*state, batch)
    return loss

  return call


def _child(what: str, config: models.ModelConfig) -> None:
  """Measures in this process; prints one JSON line."""
  memory.keep_freed_memory()
  mode, shape = what.split(":")
  rows, tokens = map(int, shape.split("x"))
  seconds = _timed(_step_of(config, mode, rows, tokens), _REPEATS.value)
  peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  side = 2048 if jax.default_backend() == "cpu" else 8192
  square = jnp.ones((side, side), _DTYPE.value)
  product = jax.jit(jnp.matmul)
  peak = 2 * side**3 / statistics.median(_timed(lambda: product(square, square), 20))
  print(json.dumps({"seconds": seconds, "peak_rss_mib": peak_rss, "product_flops_per_s": peak}))


def _run(command: list[str]) -> dict[str, Any]:
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
  if done.returncode:
    raise app.UsageError(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def _ours(mode: str, shape: str) -> dict[str, Any]:
  command = [sys.executable, "-m", "benchmarks.model", f"--child={mode}:{shape}"]
  return _run(command + [f"--{flag.name}={flag.value}" for flag in _SETTINGS])


def _peer(config: models.ModelConfig, name: str, mode: str, shape: str) -> dict[str, Any]:
  experts, _, compiled = name.partition("+")
  sizes = hf_config.to_dict(config)
  rows, tokens = shape.split("x")
  script = str(ROOT / "benchmarks" / "peers" / "qwen3_moe.py")
  flag = "1" if compiled else "0"
  arguments = [json.dumps(sizes), mode, experts, flag, rows, tokens, str(_REPEATS.value)]
  return _run([str(PEER_PYTHON), script, *arguments])


def _measure(config: models.ModelConfig, mode: str, shape: str) -> dict[str, Any]:
  rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in ("rome", *_PEERS.value)}
  for _ in range(_ROUNDS.value):
    for name, found in rounds.items():
      found.append(_ours(mode, shape) if name == "rome" else _peer(config, name, mode, shape))
  rows, tokens = map(int, shape.split("x"))
  median = {n: statistics.median(s for r in f for s in r["seconds"]) for n, f in rounds.items()}
  memory = {n: max(r["peak_rss_mib"] for r in f) for n, f in rounds.items()}
  peers = [n for n in rounds if n != "rome"]
  flops = product_flops(config, tokens) * rows * tokens * (3 if mode == "train" else 1)
  peak = statistics.median(r["product_flops_per_s"] for r in rounds["rome"])
  line = {
    "benchmark": "model",
    "mode": mode,
    "shape": shape,
    "settings": {flag.name: flag.value for flag in _SETTINGS},
    "tokens_per_s": {n: round(rows * tokens / s, 1) for n, s in median.items()},
    "seconds": {n: [round(s, 4) for r in f for s in r["seconds"]] for n, f in rounds.items()},
    "peak_rss_mib": {n: round(m) for n, m in memory.items()},
    "product_gflops_per_s": round(peak / 1e9, 1),
    "peak_share": round(flops / median["rome"] / peak, 3),
  }
  if peers:
    line["ratio"] = round(min(median[n] for n in peers) / median["rome"], 3)
    line["memory_ratio"] = round(memory["rome"] / min(memory[n] for n in peers), 3)
    line["peer_versions"] = rounds[peers[0]][0]["versions"]
  return line | summary.provenance()


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  config = models.PRESETS[_PRESET.value]
  if _CHILD.value:
    _child(_CHILD.value, config)
    return
  if _PEERS.value and not PEER_PYTHON.exists():
    print("no .peers (scripts/setup_peers.sh): measuring rome alone", file=sys.stderr)
    _PEERS.value = []
  for mode in _MODES.value:
    for shape in _SHAPES.value:
      print(json.dumps(_measure(config, mode, shape)), flush=True)


if __name__ == "__main__":
  app.run(main)
