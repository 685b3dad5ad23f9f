"""Cost of the losses alone: forward and backward given the log-probs, one JSON line an estimator.

  python -m benchmarks.ipa_loss

IPA beside GRPO and GSPO on the same arrays, in turn within one process, so that the ratios hold
whatever else the machine does. The model is not in it; `step_share` says what share of a training
step of the model preset `--model` the loss would be at equal tokens (measured on one micro-batch).
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
import numpy as np
from absl import app, flags

from rome import ipa, models
from rome.train import summary

_ROWS = flags.DEFINE_integer("rows", 64, "B.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 4096, "T.", lower_bound=64)
_CHUNKS = flags.DEFINE_integer("chunks", 32, "C.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 30, "Timed calls of each.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the arrays.")
_MODEL = flags.DEFINE_string("model", "tiny", "Preset whose training step is compared with.")
_ESTIMATORS = ("ipa", "grpo", "gspo")


def make_batch(rows: int, tokens: int, chunks: int, seed: int) -> tuple[np.ndarray, ipa.ChunkBatch]:
  """One episode a row: `chunks` chunks, half of the tokens sampled, off-policy by a little."""
  rng = np.random.default_rng(seed)
  span = tokens // chunks
  column = np.arange(tokens)
  inside = (column % span >= span // 2) & (column < chunks * span)
  chunk_ids = np.broadcast_to(np.where(inside, column // span, -1), (rows, tokens))
  logp = -rng.exponential(1.0, (rows, tokens)).astype(np.float32)
  noise = rng.normal(0, 0.1, (2, rows, tokens)).astype(np.float32)
  positive = np.repeat(rng.random((rows, 1)) < 0.5, chunks, axis=1)
  zeros_BxT = np.zeros((rows, tokens), np.int32)
  ids_BxC = np.repeat(np.arange(rows, dtype=np.int32)[:, None], chunks, axis=1)
  return logp, ipa.ChunkBatch(
    tokens=zeros_BxT,
    segment_ids=zeros_BxT,
    positions=zeros_BxT,
    chunk_ids=chunk_ids.astype(np.int32),
    old_logp=logp + noise[0],
    behavior_logp=logp + noise[0] + noise[1],
    returns=np.where(positive, 1, -1).astype(np.float32),
    positive=positive,
    il_mask=np.zeros((rows, chunks), bool),
    trajectory_ids=ids_BxC,
    group_ids=ids_BxC // 8,
    versions=np.zeros((rows, chunks), np.int32),
  )


def timed(call: Callable[[], Any]) -> float:
  started = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - started


def model_seconds_per_token(preset: str) -> float:
  """Forward and backward of the model on 8 rows of 256 tokens, seconds a token, the median of 5."""
  config = models.PRESETS[preset]
  params = models.init_params(config, jax.random.key(0))
  tokens = jnp.zeros((8, 256), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(256), tokens.shape)

  def loss(params: Any) -> jax.Array:
    logits = models.forward(config, params, tokens, tokens + 1, positions)
    return models.token_logps(logits, tokens, models.Sampling())[0].sum()

  step = functools.partial(jax.jit(jax.grad(loss)), params)
  timed(step)
  return statistics.median(timed(step) for _ in range(5)) / tokens.size


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}")
  logp, batch = make_batch(_ROWS.value, _TOKENS.value, _CHUNKS.value, _SEED.value)
  logp, batch = jax.device_put((logp, batch))
  calls, compile_seconds = {}, {}
  for name in _ESTIMATORS:
    loss = functools.partial(ipa.ESTIMATORS[name], config=ipa.IPAConfig())
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    calls[name] = functools.partial(grad, logp, batch)
    compile_seconds[name] = timed(calls[name])
  seconds = {name: [] for name in _ESTIMATORS}
  for _ in range(_REPEATS.value):
    for name, call in calls.items():
      seconds[name].append(timed(call))
  step = model_seconds_per_token(_MODEL.value) * logp.size
  for name in _ESTIMATORS:
    median = statistics.median(seconds[name])
    row = {
      "benchmark": "ipa_loss",
      "estimator": name,
      "shape": [_ROWS.value, _TOKENS.value, _CHUNKS.value],
      "seed": _SEED.value,
      "median_ms": round(1e3 * median, 3),
      "min_ms": round(1e3 * min(seconds[name]), 3),
      "repeats": _REPEATS.value,
      "compile_s": round(compile_seconds[name], 2),
      "model": _MODEL.value,
      "step_share": round(median / (step + median), 5),
    }
    row |= summary.provenance() | {"load_1min": round(os.getloadavg()[0], 2)}
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
  app.run(main)
