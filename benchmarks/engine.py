"""Generation beside transformers' `generate` on random weights of one size: one JSON line a batch.

  scripts/setup_peers.sh        # once: .peers with torch and transformers; without it, no peers
  python -m benchmarks.engine [--preset=bench_small] [--batches=1,16,64] [--rounds=2]

Each row has a prompt of `--prompt` random ids, no two alike, so that nothing is found in the prefix
cache, and samples `--new` tokens from the whole vocabulary at temperature 1; there are no stop
tokens. Ours is `rome.rollout.engine.Engine` with as many slots as rows. Every measure is a process
of its own, ours and theirs in turn, `--rounds` times, after warm-up calls. The engine's time
includes the queue, the prefix tree and the log-prob of every token, which `generate` does not give.

`tokens_per_s` and `ratio` (ours to the fastest peer) are from the median time of whole calls,
prefill included. `decode_tokens_per_s` leaves out what a call takes that samples one token.
`bandwidth_share` is the bytes that a decode step must read (every weight but the embedding once, of
the experts those that were really chosen, and the keys and values) times the steps a second of
whole calls, over the read bandwidth measured in our own process just before and after
(`benchmarks/_bandwidth.py`); `decode_bandwidth_share` takes the steps without prefill. A figure
without prefill is null where noise makes the shorter calls take longer.

A peer is `EXPERTS[+static][+compile]`, see benchmarks/peers/generate.py. `batched_mm` copies the
chosen experts' weights for every token: a batch whose copies exceed 4 GiB leaves it out, and says
so. Peak memory is not compared here; benchmarks/model.py does that.

On an accelerator, with a torch that sees it (`--peer_python`):

  python -m benchmarks.engine --preset=dense_1b --dtype=bfloat16 \
    --peers=default,default+static,default+compile
"""

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks import _bandwidth
from benchmarks._counts import step_bytes
from rome import models
from rome.models import hf_config
from rome.rollout.engine import Engine, Request
from rome.train import summary

_PRESET = flags.DEFINE_string("preset", "bench_small", "Model.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", models.config.COMPUTE_TYPES, "Weights, products.")
_BATCHES = flags.DEFINE_list("batches", ["1", "16", "64"], "Rows.")
_PROMPT = flags.DEFINE_integer("prompt", 64, "Tokens of a prompt.", lower_bound=1)
_NEW = flags.DEFINE_integer("new", 64, "Tokens sampled a row.", lower_bound=2)
_PEERS = flags.DEFINE_list(
  "peers", ["eager", "grouped_mm", "batched_mm", "grouped_mm+compile"], "Of transformers."
)
_PEER_PYTHON = flags.DEFINE_string("peer_python", ".peers/bin/python", "Interpreter of the peers.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Processes of each.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed calls a process.", lower_bound=1)
_BACKEND = flags.DEFINE_enum("backend", "auto", ["auto", "native", "xla"], "Of our engine.")
_NUMERICS = flags.DEFINE_enum("numerics", "fast", ["fast", "exact"], "Of our engine.")
_STEPS = flags.DEFINE_integer("steps", 8, "Of our engine: tokens a device call.")
_PREFILL = flags.DEFINE_integer("prefill_tokens", 4096, "Of our engine: at most so many a step.")
_SEED = flags.DEFINE_integer("seed", 0, "Of weights, prompts and draws.")
_SETTINGS = (
  _PRESET, _DTYPE, _PROMPT, _NEW, _REPEATS, _BACKEND, _NUMERICS, _STEPS, _PREFILL, _SEED
)  # fmt: skip
_CHILD = flags.DEFINE_integer("child", 0, "Internal: rows to measure in this process.")

ROOT = pathlib.Path(__file__).parents[1]
_MOST_COPIED = 4 << 30  # bytes of experts' weights that a peer may copy


class Failed(RuntimeError):
  """A process that measures has failed."""


class Side:
  """Our engine with `batch` slots, and the calls that are timed."""

  def __init__(self, config: models.ModelConfig, batch: int):
    self._config, self._batch = config, batch
    self._rng = np.random.default_rng(_SEED.value)
    # No two prompts of this process begin alike, as long as there are first tokens left.
    self._firsts = iter(self._rng.permutation(config.vocab_size).tolist())
    compute = dataclasses.replace(models.config.ROW_COMPUTE, dtype=_DTYPE.value)
    self._engine = Engine(
      config, slots=batch, max_length=_PROMPT.value + _NEW.value, steps=_STEPS.value,
      prefill_tokens=_PREFILL.value, backend=_BACKEND.value, numerics=_NUMERICS.value,
      compute=compute if _NUMERICS.value == "fast" else None,
    )  # fmt: skip
    params = jax.jit(_init, static_argnums=(0, 1))(config, _DTYPE.value, _SEED.value)
    self.parameters = sum(x.size for x in jax.tree.leaves(params))
    self._engine.publish(params, 0, jax.random.key(_SEED.value))

  def call(self, new: int, choices: bool = False) -> list[Any]:
    """Samples `new` tokens for every row; the replies."""
    engine, replies = self._engine, []
    for row in range(self._batch):
      rest = self._rng.integers(0, self._config.vocab_size, _PROMPT.value - 1).tolist()
      engine.submit(Request((next(self._firsts), *rest), new, key=(row, 0), router_choices=choices))
    while engine.busy:
      replies += [update.reply for update in engine.step() if update.reply]
    assert [len(reply.tokens) for reply in replies] == [new] * self._batch
    return replies

  def timed(self, new: int) -> list[float]:
    before, seconds = self._engine.stats, []
    for _ in range(_REPEATS.value):
      start = time.perf_counter()
      self.call(new)
      seconds.append(time.perf_counter() - start)
    assert self._engine.stats.cached_tokens == before.cached_tokens, "prompts began alike"
    return seconds

  def distinct_experts(self) -> float:
    """Experts that a decode step visits, the mean over steps and sparse layers; 0 if dense."""
    if not self._config.num_experts:
      return 0.0
    new = _NEW.value
    choices = np.stack([reply.choices[-new:] for reply in self.call(new, choices=True)])
    steps, layers = choices.shape[1:3]
    counts = [len(np.unique(choices[:, i, j])) for i in range(steps) for j in range(layers)]
    return statistics.fmean(counts)


def _init(config: models.ModelConfig, dtype: str, seed: int) -> Any:
  params = models.init_params(config, jax.random.key(seed))
  return jax.tree.map(lambda x: x.astype(dtype), params)


def _child(config: models.ModelConfig, batch: int) -> None:
  """Measures in this process; prints one JSON line."""
  side = Side(config, batch)
  distinct = side.distinct_experts()  # warms up too
  side.call(_NEW.value)
  reader = _bandwidth.Reader()
  bandwidth = reader.measure()
  seconds, first = side.timed(_NEW.value), side.timed(1)
  bandwidth += reader.measure()
  found = {
    "seconds": seconds,
    "first_seconds": first,
    "bandwidth": bandwidth,
    "bandwidth_by": reader.how,
    "distinct_experts": distinct,
    "parameters": side.parameters,
    "platform": jax.default_backend(),
    "provenance": summary.provenance(),
  }
  print(json.dumps(found))


def _run(command: list[str]) -> dict[str, Any]:
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
  if done.returncode:
    raise Failed(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def _ours(batch: int) -> dict[str, Any]:
  command = [sys.executable, "-m", "benchmarks.engine", f"--child={batch}"]
  return _run(command + [f"--{flag.name}={flag.value}" for flag in _SETTINGS])


def _peer(config: models.ModelConfig, name: str, batch: int, platform: str) -> dict[str, Any]:
  sizes = json.dumps(hf_config.to_dict(config, _DTYPE.value))
  script = str(ROOT / "benchmarks" / "peers" / "generate.py")
  device = "cpu" if platform == "cpu" else "cuda"
  numbers = (batch, _PROMPT.value, _NEW.value, _REPEATS.value)
  return _run([_PEER_PYTHON.value, script, sizes, name, device, *map(str, numbers)])


def _copied(config: models.ModelConfig, batch: int) -> int:
  """Bytes of experts' weights that `batched_mm` copies in a prefill."""
  visits = batch * _PROMPT.value * config.num_experts_per_tok
  return visits * 3 * config.hidden_size * config.moe_intermediate_size * 4


def _peers(config: models.ModelConfig, batch: int) -> tuple[list[str], dict[str, str]]:
  """Those that are measured, and why the others are not."""
  copied, left_out = _copied(config, batch), {}
  for name in _PEERS.value:
    if name.startswith("batched_mm") and copied > _MOST_COPIED:
      left_out[name] = f"would copy {copied / 2**30:.1f} GiB of weights in a prefill"
  return [name for name in _PEERS.value if name not in left_out], left_out


def _measure(config: models.ModelConfig, batch: int) -> dict[str, Any]:
  peers, left_out = _peers(config, batch)
  rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in ("rome", *peers)}
  for _ in range(_ROUNDS.value):
    rounds["rome"].append(_ours(batch))
    for name in [name for name in peers if name in rounds]:
      try:
        rounds[name].append(_peer(config, name, batch, rounds["rome"][0]["platform"]))
      except (Failed, subprocess.TimeoutExpired) as error:
        left_out[name] = str(error)[-200:]
        del rounds[name]
  peers = [name for name in rounds if name != "rome"]
  ours = rounds["rome"][0]
  for name, found in rounds.items():
    assert found[0]["parameters"] == ours["parameters"], (name, found[0]["parameters"])
  whole, first = (
    {n: statistics.median(s for r in f for s in r[key]) for n, f in rounds.items()}
    for key in ("seconds", "first_seconds")
  )
  new = _NEW.value
  rest = {name: whole[name] - first[name] for name in rounds}
  shares = {"": whole["rome"] / new, "decode_": rest["rome"] / (new - 1)}
  bandwidth = statistics.median(b for r in rounds["rome"] for b in r["bandwidth"])
  distinct = statistics.fmean(r["distinct_experts"] for r in rounds["rome"])
  read = step_bytes(
    config, batch, _PROMPT.value + (new - 1) / 2, distinct, 4 if _DTYPE.value == "float32" else 2
  )

  def rate(tokens: int, seconds: dict[str, float]) -> dict[str, float | None]:
    return {n: round(batch * tokens / s, 1) if s > 0 else None for n, s in seconds.items()}

  def share(seconds: float) -> float | None:
    return round(read / seconds / bandwidth, 3) if seconds > 0 else None

  line = {
    "benchmark": "engine",
    "batch": batch,
    "settings": {flag.name: flag.value for flag in _SETTINGS},
    "tokens_per_s": rate(new, whole),
    "decode_tokens_per_s": rate(new - 1, rest),
    "first_token_s": {name: round(s, 4) for name, s in first.items()},
    "seconds": {n: [round(s, 4) for r in f for s in r["seconds"]] for n, f in rounds.items()},
    "parameters": ours["parameters"],
    "distinct_experts": round(distinct, 2),
    "step_mbytes": round(read / 1e6, 1),
    "bandwidth_gbytes_per_s": round(bandwidth / 1e9, 1),
    "bandwidth_by": ours["bandwidth_by"],
    **{f"{key}bandwidth_share": share(s) for key, s in shares.items()},
  }
  if peers:
    fastest = min(peers, key=lambda name: whole[name])
    line["fastest_peer"] = fastest
    line["ratio"] = round(whole[fastest] / whole["rome"], 3)
    line["peer_versions"] = rounds[fastest][0]["versions"]
  if left_out:
    line["peers_left_out"] = left_out
  return line | ours["provenance"]


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  config = models.PRESETS[_PRESET.value]
  if _CHILD.value:
    _child(config, _CHILD.value)
    return
  if _PEERS.value and not (ROOT / _PEER_PYTHON.value).exists():
    print("no .peers (scripts/setup_peers.sh): measuring rome alone", file=sys.stderr)
    _PEERS.value = []
  for batch in map(int, _BATCHES.value):
    print(json.dumps(_measure(config, batch)), flush=True)


if __name__ == "__main__":
  app.run(main)
