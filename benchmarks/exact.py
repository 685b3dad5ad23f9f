"""What exact numerics cost on this machine: generation and training, exact beside fast.

  python -m benchmarks.exact

The quickstart's shapes: `--slots` requests at once, each `--context` tokens and a reply of
`--reply`, at most `--length` together; then one update on what was sampled, of the whole batch.
Fast and exact take turns within one process, `--repeats` times, with new contexts each time, so
that no prefix is found in the cache; figures are medians, ratios are fast to exact. Generation is
timed for the backend that a run would choose ("fast") and for the one that exact shares its code
with ("xla"). Fast training packs rows of 256 tokens, eight a device call, as the quickstart does.

`mismatch_mean` and `mismatch_max` are of the trainer's log-probs from the engine's, in nats, each
kind of update on the replies of its own engine. About two minutes on two cores.
"""

import functools
import json
import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import memory
from rome import ipa, models, rollout
from rome.models import exact
from rome.train import state as state_lib
from rome.train import summary
from rome.train.config import StageConfig, chunk_slots
from rome.train.step import ipa_step
from rome.trajectory import Trajectory, Valid

_PRESET = flags.DEFINE_string("preset", "tiny", "Model.")
_SLOTS = flags.DEFINE_integer("slots", 32, "Requests at once.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 160, "Places of a row; whole tiles.", lower_bound=16)
_CONTEXT = flags.DEFINE_integer("context", 80, "Tokens in front of a reply.", lower_bound=1)
_REPLY = flags.DEFINE_integer("reply", 48, "Tokens of a reply.", lower_bound=1)
_REQUESTS = flags.DEFINE_integer("requests", 64, "Of a round.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed rounds of each.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the parameters and the contexts.")

ENGINES = {"fast": ("fast", "auto"), "xla": ("fast", "xla"), "exact": ("exact", "auto")}
IPA = ipa.IPAConfig(failure_reward=-1.0)
SAMPLING = models.Sampling()


def make_engine(config: models.ModelConfig, params: Any, numerics: str, backend: str) -> Any:
  # Stop token: none, so that every reply has its full length.
  engine = rollout.Engine(
    config,
    slots=_SLOTS.value,
    max_length=_LENGTH.value,
    numerics=numerics,
    backend=backend,
  )
  engine.publish(params, 0, jax.random.key(_SEED.value))
  return engine


def generate(engine: rollout.Engine, turn: int) -> tuple[float, list[Trajectory]]:
  """Seconds, and one trajectory a request; contexts follow from the turn."""
  rng = np.random.default_rng((_SEED.value, turn))
  contexts = rng.integers(0, engine.config.vocab_size, (_REQUESTS.value, _CONTEXT.value)).tolist()
  started = time.perf_counter()
  ids = [
    engine.submit(rollout.Request(tuple(context), _REPLY.value, SAMPLING, key=(turn, i)))
    for i, context in enumerate(contexts)
  ]
  replies: dict[int, rollout.Reply] = {}
  while engine.busy:
    replies |= {update.id: update.reply for update in engine.step() if update.reply}
  seconds = time.perf_counter() - started
  return seconds, [_trajectory(i, contexts[i], replies[id]) for i, id in enumerate(ids)]


def _trajectory(i: int, context: list[int], reply: rollout.Reply) -> Trajectory:
  return Trajectory(
    id=f"t#{i}",
    task_id=f"t{i}",
    family="f",
    instruction="",
    tokens=np.array([*context, *reply.tokens], np.int32),
    call_ids=np.array([-1] * len(context) + [0] * len(reply.tokens), np.int32),
    logps=np.array([0.0] * len(context) + reply.logps, np.float32),
    versions=np.zeros(1, np.int32),
    chunk_rewards=np.zeros(1, np.float32),
    reward=Valid(float(i % 2)),
    end_reason="submitted",
    turns=(),
  )


def train(
  config: models.ModelConfig, state: Any, optimizer: Any, numerics: str, played: list[Trajectory]
) -> tuple[float, dict[str, float]]:
  """Seconds of one update, and its metrics."""
  fast = numerics == "fast"
  shape = (8, 256) if fast else (_SLOTS.value, _LENGTH.value)
  batch = rollout.pack(
    played,
    IPA,
    0,
    row_length=shape[1],
    max_chunks=chunk_slots(shape[1]),
    rows_multiple=shape[0],
    pad=0,
    share_rows=fast,
  )
  # The update takes over the optimiser's state; the next one starts from the same.
  state = state.replace(opt_state=jax.tree.map(jnp.copy, state.opt_state))
  started = time.perf_counter()
  new, metrics = ipa_step(
    state,
    batch,
    config=config,
    sampling=SAMPLING,
    ipa_config=IPA,
    optimizer=optimizer,
    micro_rows=shape[0],
    num_trajectories=len(played),
    numerics=numerics,
  )
  jax.block_until_ready(new.params)
  return time.perf_counter() - started, metrics


def _line(mode: str, tokens: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
  speed = {name: tokens / statistics.median(s) for name, s in seconds.items()}
  return {
    "benchmark": "exact",
    "mode": mode,
    "preset": _PRESET.value,
    "shape": {f.name: f.value for f in (_SLOTS, _LENGTH, _CONTEXT, _REPLY, _REQUESTS)},
    "tokens": tokens,
    "tokens_per_s": {name: round(x, 1) for name, x in speed.items()},
    "cost": {name: round(x / speed["exact"], 2) for name, x in speed.items() if name != "exact"},
    "seconds": {name: [round(x, 4) for x in s] for name, s in seconds.items()},
  }


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}")
  if _LENGTH.value % exact.TILE or _CONTEXT.value + _REPLY.value > _LENGTH.value:
    raise app.UsageError(f"--length must be in whole tiles of {exact.TILE}, and hold a request")
  memory.keep_freed_memory()
  config = models.PRESETS[_PRESET.value]
  optimizer = state_lib.make_optimizer(StageConfig(steps=9, batch=1, learning_rate=1e-3))
  state = state_lib.init_state(config, optimizer, _SEED.value)
  engines = {name: make_engine(config, state.params, *how) for name, how in ENGINES.items()}
  generating: dict[str, list[float]] = {name: [] for name in engines}
  training: dict[str, list[float]] = {"fast": [], "exact": []}
  update = functools.partial(train, config, state, optimizer)
  gaps: dict[str, dict[str, float]] = {}
  for turn in range(_REPEATS.value + 1):  # the first round compiles
    for name, engine in engines.items():
      seconds, played = generate(engine, turn)
      generating[name].append(seconds)
      if name in training:
        seconds, metrics = update(name, played)
        training[name].append(seconds)
        gaps[name] = {k: v for k, v in metrics.items() if k in ("mismatch_mean", "mismatch_max")}
  about = {"seed": _SEED.value, "repeats": _REPEATS.value, **summary.provenance()}
  about["load_1min"] = round(os.getloadavg()[0], 2)
  sampled = _REQUESTS.value * _REPLY.value
  trained = _REQUESTS.value * (_CONTEXT.value + _REPLY.value)
  timed = [{n: s[1:] for n, s in seconds.items()} for seconds in (generating, training)]
  print(json.dumps(_line("generate", sampled, timed[0]) | about), flush=True)
  print(json.dumps(_line("train", trained, timed[1]) | {"gaps": gaps} | about), flush=True)


if __name__ == "__main__":
  app.run(main)
