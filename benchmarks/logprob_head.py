"""Speed and memory of the log-prob head beside whole logits, one JSON line a width and pass.

  python -m benchmarks.logprob_head

`head_logps` beside `token_logps` of all logits at once (the naive form), on the same arrays, in
turn within one process, so that the ratios hold whatever else the machine does. `temp_ratio`
compares what XLA sets aside for temporaries; `errors` has, of each result, the largest difference
from the naive form beside the largest magnitude. About 6 GiB and a few minutes on two cores.
"""

import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from rome import models
from rome.train import summary

_VOCAB = flags.DEFINE_integer("vocab", 151_936, "V; Qwen3's.", lower_bound=2)
_HIDDEN = flags.DEFINE_multi_integer("hidden", [512, 1024], "D, one after another.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 2, "B.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 512, "T.", lower_bound=2)
_TIED = flags.DEFINE_bool("tied", False, "The kernel is the transpose of an embedding.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the hidden states.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed calls of each.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the arrays.")

Score = Callable[..., tuple[jax.Array, jax.Array]]
SAMPLING = models.Sampling()


def naive(hidden: jax.Array, kernel: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
  kernel = kernel.astype(hidden.dtype)
  logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
  return models.token_logps(logits, tokens, SAMPLING)


def fused(hidden: jax.Array, kernel: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
  return models.head_logps(hidden, kernel, tokens, SAMPLING, _TIED.value)


def arrays(hidden_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Hidden states as after a norm, weights [D, V] ([V, D] if tied) as at the start, any tokens."""
  keys = jax.random.split(jax.random.key(_SEED.value), 3)
  rows = (_ROWS.value, _TOKENS.value)
  sizes = (_VOCAB.value, hidden_size) if _TIED.value else (hidden_size, _VOCAB.value)
  hidden = jax.random.normal(keys[0], (*rows, hidden_size)).astype(_DTYPE.value)
  weights = jax.random.normal(keys[1], sizes) * hidden_size**-0.5
  return hidden, weights, jax.random.randint(keys[2], rows, 0, _VOCAB.value)


def compiled(score: Score, backward: bool, args: tuple) -> Any:
  """The forward pass, or the gradient of the sum of log-probs for hidden states and weights."""

  def run(hidden: jax.Array, weights: jax.Array, tokens: jax.Array) -> Any:
    return score(hidden, weights.T if _TIED.value else weights, tokens)

  def loss(*args: jax.Array) -> jax.Array:
    return run(*args)[0].sum()

  function = jax.grad(loss, argnums=(0, 1)) if backward else run
  return jax.jit(function).lower(*args).compile()


def timed(call: Callable[[], Any]) -> float:
  started = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - started


def errors(got: Any, want: Any, names: tuple[str, str]) -> dict[str, list[float]]:
  """Of each array: the largest difference, and the largest magnitude to set it beside."""
  pairs = {
    name: (float(jnp.abs(g - w).max()), float(jnp.abs(w).max()))
    for name, g, w in zip(names, got, want, strict=True)
  }
  return {name: [float(f"{x:.3g}") for x in pair] for name, pair in pairs.items()}


def measure(hidden_size: int, backward: bool) -> dict[str, Any]:
  """One line: both forms at one width."""
  args = arrays(hidden_size)
  forms = {f.__name__: compiled(f, backward, args) for f in (naive, fused)}
  calls = {name: functools.partial(form, *args) for name, form in forms.items()}
  names = ("hidden_gradient", "kernel_gradient") if backward else ("logp", "entropy")
  error = errors(calls["fused"](), calls["naive"](), names)  # the first call of each, untimed
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(_REPEATS.value):
    for name, call in calls.items():
      seconds[name].append(timed(call))
  temp = {name: form.memory_analysis().temp_size_in_bytes for name, form in forms.items()}
  median = {name: statistics.median(times) for name, times in seconds.items()}
  return {
    "pass": "forward+backward" if backward else "forward",
    "shape": [_ROWS.value, _TOKENS.value, hidden_size, _VOCAB.value],
    "naive_ms": round(1e3 * median["naive"], 1),
    "fused_ms": round(1e3 * median["fused"], 1),
    "speed_ratio": round(median["naive"] / median["fused"], 3),
    "speed_ratios": [round(n / f, 3) for n, f in zip(*seconds.values(), strict=True)],
    "naive_temp_mib": round(temp["naive"] / 2**20, 1),
    "fused_temp_mib": round(temp["fused"] / 2**20, 1),
    "temp_ratio": round(temp["fused"] / temp["naive"], 4),
    "errors": error,
  }


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}")
  settings = {"dtype": _DTYPE.value, "tied": _TIED.value, "seed": _SEED.value}
  for hidden_size in _HIDDEN.value:
    for backward in (False, True):
      row = {"benchmark": "logprob_head"} | measure(hidden_size, backward) | settings
      row |= {"repeats": _REPEATS.value} | summary.provenance()
      print(json.dumps(row | {"load_1min": round(os.getloadavg()[0], 2)}), flush=True)


if __name__ == "__main__":
  app.run(main)
