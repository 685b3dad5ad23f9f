"""What sharing prefixes saves in the engine: counts and times, one JSON line a case.

  python -m benchmarks.prefix [--preset=bench_small]

- `group`: `--samples` samples of a context of `--context` tokens, against one such prompt: context
  tokens and FLOPs of matrix products (attention counts the keys that a query sees; padding is not
  counted), and the time until every sample has its first token, against as many prompts that share
  nothing.
- `episode`: `--turns` turns, each with the whole history as its context: context tokens that are
  computed, over the final length; `through_model` adds the sampled ones.
- `resampling`: the same episode over, from the context of each of its chunks: context tokens that
  are computed, and the time to the first token, chunk by chunk in random order; `cold_seconds` is
  the last chunk's where nothing is known.

A context's last token is fed by the decode of every sample of its own, so it counts as computed
every time. Times are medians on this machine, without a peer. They do not say what a token costs:
each of these calls samples one. Ids are random, and so are the weights.
"""

import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks._counts import context_flops
from rome import models
from rome.rollout.engine import Engine, Reply, Request
from rome.train import summary

_PRESET = flags.DEFINE_string("preset", "bench_small", "Model.")
_SAMPLES = flags.DEFINE_integer("samples", 16, "Of the group.", lower_bound=2)
_CONTEXT = flags.DEFINE_integer("context", 1024, "Tokens of the group's context.", lower_bound=2)
_TURNS = flags.DEFINE_integer("turns", 10, "Of the episode.", lower_bound=2)
_REPLY = flags.DEFINE_integer("reply", 32, "Tokens that a turn samples.", lower_bound=1)
_TOOL = flags.DEFINE_integer("tool", 50, "Tokens of tool text behind a reply.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each kind.", lower_bound=1)
_BACKEND = flags.DEFINE_enum("backend", "auto", ["auto", "native", "xla"], "Of the engine.")
_NUMERICS = flags.DEFINE_enum("numerics", "fast", ["fast", "exact"], "Of the engine.")
_SEED = flags.DEFINE_integer("seed", 0, "Of weights, ids and draws.")
_SETTINGS = (
  _PRESET, _SAMPLES, _CONTEXT, _TURNS, _REPLY, _TOOL, _REPEATS, _BACKEND, _NUMERICS, _SEED
)  # fmt: skip


class Bench:
  """An engine, and what is asked of it."""

  def __init__(self, config: models.ModelConfig):
    self.config = config
    self._rng = np.random.default_rng(_SEED.value)
    episode = _TURNS.value * (_REPLY.value + _TOOL.value)
    self._engine = Engine(
      config,
      slots=_SAMPLES.value,
      max_length=max(_CONTEXT.value + 8, episode + 8),
      backend=_BACKEND.value,
      numerics=_NUMERICS.value,
    )
    init = jax.jit(models.init_params, static_argnums=0)
    self._params = init(config, jax.random.key(_SEED.value))
    self._version = -1
    self._keys = iter(range(1 << 31))
    self.forget()

  def forget(self) -> None:
    """What is cached belongs to older weights from now on, and is gone."""
    self._version += 1
    self._engine.publish(self._params, self._version, jax.random.key(_SEED.value))

  def ids(self, count: int) -> tuple[int, ...]:
    return tuple(self._rng.integers(0, self.config.vocab_size, count).tolist())

  def ask(self, contexts: Sequence[tuple[int, ...]], new: int = 1) -> tuple[list[Reply], float]:
    """Submits them together, each with randomness of its own: replies in order, and the seconds."""
    engine, replies = self._engine, {}
    start = time.perf_counter()
    ids = [engine.submit(Request(c, new, key=(next(self._keys), 0))) for c in contexts]
    while engine.busy:
      replies |= {update.id: update.reply for update in engine.step() if update.reply}
    seconds = time.perf_counter() - start
    return [replies[id] for id in ids], seconds

  @property
  def prefilled(self) -> int:
    return self._engine.stats.prefilled_tokens


def group(bench: Bench) -> dict[str, Any]:
  samples, length = _SAMPLES.value, _CONTEXT.value
  together, apart, alone, counts, flops = [], [], [], set(), set()
  for _ in range(_REPEATS.value + 1):  # the first compiles
    alone.append(bench.ask([bench.ids(length)])[1])
    before = bench.prefilled
    replies, seconds = bench.ask([bench.ids(length)] * samples)
    together.append(seconds)
    computed = [(reply.cached, length) for reply in replies]
    assert sum(end - start - 1 for start, end in computed) == bench.prefilled - before
    counts.add(sum(end - start for start, end in computed))
    flops.add(sum(context_flops(bench.config, start, end) for start, end in computed))
    apart.append(bench.ask([bench.ids(length) for _ in range(samples)])[1])
    bench.forget()
  one, group, separate = (statistics.median(times[1:]) for times in (alone, together, apart))
  return {
    "case": "group",
    "computed_tokens": max(counts),
    "tokens_to_one_prompt": round(max(counts) / length, 4),
    "flops_to_one_prompt": round(max(flops) / context_flops(bench.config, 0, length), 4),
    "seconds": {
      "one_prompt": round(one, 4),
      "group": round(group, 4),
      "separate_prompts": round(separate, 4),
    },
    "time_to_one_prompt": round(group / one, 3),
    "time_to_separate_prompts": round(group / separate, 3),
  }


def _play(bench: Bench) -> tuple[list[tuple[int, ...]], int]:
  """An episode: the context of every turn, and the final length."""
  tokens, contexts = bench.ids(_TOOL.value), []
  for _ in range(_TURNS.value):
    contexts.append(tokens)
    (reply,), _ = bench.ask([tokens], _REPLY.value)
    tokens = (*tokens, *reply.tokens, *bench.ids(_TOOL.value))
  return contexts, len(contexts[-1]) + _REPLY.value


def episode(bench: Bench) -> dict[str, Any]:
  before = bench.prefilled
  contexts, length = _play(bench)
  computed = bench.prefilled - before + len(contexts)
  sampled_only = len(contexts) * (_REPLY.value - 1)  # those that a decode fed
  return {
    "case": "episode",
    "final_length": length,
    "computed_tokens": computed,
    "computed_to_length": round(computed / length, 4),
    "through_model_to_length": round((computed + sampled_only) / length, 4),
    "without_sharing_to_length": round(sum(map(len, contexts)) / length, 4),
  }


def resampling(bench: Bench) -> dict[str, Any]:
  contexts, _ = _play(bench)
  prefilled: dict[int, set[int]] = {k: set() for k in range(len(contexts))}
  seconds: dict[int, list[float]] = {k: [] for k in range(len(contexts))}
  rng = np.random.default_rng(_SEED.value)
  for _ in range(_REPEATS.value):
    for k in rng.permutation(len(contexts)).tolist():
      before = bench.prefilled
      seconds[k].append(bench.ask([contexts[k]])[1])
      prefilled[k].add(bench.prefilled - before)
  medians = [statistics.median(times) for times in seconds.values()]
  cold = []
  for _ in range(_REPEATS.value):
    bench.forget()
    cold.append(bench.ask([contexts[-1]])[1])
  return {
    "case": "resampling",
    "context_tokens": [len(context) for context in contexts],
    "computed_tokens": [max(counts) + 1 for counts in prefilled.values()],
    "seconds_to_first_token": [round(s, 5) for s in medians],
    "slowest_to_fastest_chunk": round(max(medians) / min(medians), 3),
    "cold_seconds": round(statistics.median(cold), 5),
  }


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  bench = Bench(models.PRESETS[_PRESET.value])
  for case in (group, episode, resampling):
    line = {"benchmark": "prefix", **case(bench)}
    line["settings"] = {flag.name: flag.value for flag in _SETTINGS}
    print(json.dumps(line | summary.provenance()), flush=True)


if __name__ == "__main__":
  app.run(main)
