"""mini-swe-agent, unmodified, in many sandboxes at once: prints one JSON line.

  python -m benchmarks.native [--episodes=50 --faults=5 --seed=0]

`--episodes` episodes of mini-swe-agent run at the same time, each in a Podman sandbox whose only
way out is the model proxy, against one engine with random weights in exact numerics. What such a
policy says makes no sense, so an undisturbed agent ends at its limit of four calls. There are
`--faults` episodes of each kind of fault:

  kill     the agent is killed after a call, within 2 s           agent_exit_137
  hang     the agent is stopped after a call (SIGSTOP)            agent_silent
  double   every request is sent twice at the same time           submitted, four chunks
  drop     every request is sent, hung up on, and sent again      submitted, four chunks

Then every sampled token is scored again by the trainer's program from the rows alone, which has to
give the same bits, and one IPA update is made of all episodes. Exits with status 1 where an episode
ended otherwise than above, a chunk is there twice or not at all, or a bit differs. The first run
builds the image (a minute or two); then five to ten minutes on two cores, most of it Python that
starts 50 times.
"""

import collections
import dataclasses
import json
import os
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments import memory
from rome import ipa, models, rollout
from rome.envs import generate, hub
from rome.envs.task import Task
from rome.models import exact
from rome.rollout.native import NativeAgent
from rome.train import state as state_lib
from rome.train import summary
from rome.train.config import StageConfig, chunk_slots
from rome.train.step import ipa_step
from rome.trajectory import Trajectory

_EPISODES = flags.DEFINE_integer("episodes", 50, "At once.", lower_bound=1)
_FAULTS = flags.DEFINE_integer("faults", 5, "Episodes of each kind of fault.", lower_bound=0)
_SILENCE = flags.DEFINE_float(
  "silence", 300.0, "Seconds without a call that count as a hang; all Pythons start at once."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the weights and the draws.")
_CONTEXT, _REPLY, _CALLS = 512, 24, 4
_SAMPLING = models.Sampling(temperature=0.9)
_IPA = ipa.IPAConfig(failure_reward=-1.0)
_ENDS = {
  "kill": ("agent_exit_137", range(1, _CALLS + 1)),
  "hang": ("agent_silent", range(1, _CALLS + 1)),
  "double": ("submitted", [_CALLS]),
  "drop": ("submitted", [_CALLS]),
  "plain": ("submitted", [_CALLS]),
}

_INSTALL = f"""cat > ~/mini.yaml <<'END'
agent:
  system_template: "Use bash."
  instance_template: "{{{{task}}}}"
  step_limit: {_CALLS}
  cost_limit: 0
  max_consecutive_format_errors: 0
model:
  model_name: openai/rome
  cost_tracking: ignore_errors
  observation_template: "{{{{output.output}}}}"
  format_error_template: "{{{{error}}}}"
END
cat > ~/twice.py <<'END'
{{twice}}
END
"""
_COMMAND = """export MSWEA_CONFIGURED=true MSWEA_SILENT_STARTUP=1 LITELLM_LOCAL_MODEL_COST_MAP=True
if [ -n "$FAULT" ]; then
  python3 ~/twice.py "$FAULT" & export OPENAI_BASE_URL=http://127.0.0.1:8001/v1
  export OPENAI_API_BASE=$OPENAI_BASE_URL
fi
mini -c ~/mini.yaml -t "$ROME_INSTRUCTION" --yolo --exit-immediately -o ~/mini.json < /dev/null
"""
# A bad network in front of the endpoint: says everything twice.
_TWICE = """import concurrent.futures, http.client, http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    body = self.rfile.read(int(self.headers["Content-Length"]))
    def send():
      there = http.client.HTTPConnection("127.0.0.1", 8000, timeout=600)
      there.request("POST", self.path, body, dict(self.headers))
      return there
    def ask():
      answer = send().getresponse()
      return answer.status, answer.read()
    if sys.argv[1] == "drop":
      send().close()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      answers = [f.result() for f in [pool.submit(ask) for _ in range(2)]]
    status, text = answers[0] if len(set(answers)) == 1 else (418, b"two answers")
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(text)))
    self.end_headers()
    self.wfile.write(text)
  def log_message(self, *_):
    pass
http.server.ThreadingHTTPServer(("127.0.0.1", 8001), Handler).serve_forever()
"""
_SIGNAL = """for p in /proc/[0-9]*; do
  if tr '\\0' ' ' < $p/cmdline | grep -q 'bin/mini -c'; then kill -%s ${p#/proc/}; fi
done"""


class Disturbed(NativeAgent):
  """A foreign agent with a fault, which its task's id names."""

  def __init__(self, env: Any, config: rollout.NativeConfig, fault: str):
    said = {"double": "double", "drop": "drop"}.get(fault, "")
    super().__init__(env, dataclasses.replace(config, command=f"FAULT={said}\n{config.command}"))
    self._signal = {"kill": "KILL", "hang": "STOP"}.get(fault, "")

  def watch(self) -> bool:
    assert self._calls is not None
    log = self._calls.record.log
    if self._signal and log and log[0].reply is not None:
      self.sandbox.run(_SIGNAL % self._signal, timeout=60.0)
      self._signal = ""
    return super().watch()


def tasks_of(episodes: int, faults: int) -> list[Task]:
  """Tasks whose ids name the faults of their episodes."""
  kinds = [kind for kind in _ENDS if kind != "plain" for _ in range(faults)]
  kinds += ["plain"] * (episodes - len(kinds))
  return [
    dataclasses.replace(generate("count", i), id=f"{kind}/{i}") for i, kind in enumerate(kinds)
  ]


def play(engine: rollout.Engine, params: Any, tasks: list[Task]) -> tuple[list[Trajectory], Any]:
  """The episodes, and what they took."""
  native = rollout.NativeConfig(
    command=_COMMAND, install=_INSTALL.replace("{twice}", _TWICE), silence=_SILENCE.value
  )
  sandbox = rollout.SandboxConfig(
    backend="podman",
    image=hub.EnvHub().ensure("mini-swe-agent"),
    memory_mb=768,
    disk_mb=32,
    deadline=600.0,
    reset_deadline=900.0,
  )
  agent = rollout.AgentConfig(
    context=_CONTEXT, max_reply=_REPLY, max_turns=_CALLS + 1, mode="native"
  )
  with rollout.NativeWorld(sandbox, agent, native, _SAMPLING, engine.slots) as world:
    runner = world.runner(
      engine,
      lambda task: Disturbed(world.environment(task), native, task.id.partition("/")[0]),
      _SAMPLING,
      max_reply=_REPLY,
      invalid_cap=0.5,
      patience=rollout.Patience.of(sandbox),
    )
    try:
      key = jax.random.key(_SEED.value)
      return runner.run(params, key, 0, tasks.__getitem__, 0, len(tasks))
    finally:
      world.close()
      runner.close()


def update(
  config: models.ModelConfig, state: Any, optimizer: Any, played: list[Trajectory], slots: int
) -> dict[str, float]:
  """Metrics of one IPA update in exact numerics, which sees every gap."""
  batch = rollout.pack(
    played,
    _IPA,
    0,
    row_length=_CONTEXT,
    max_chunks=chunk_slots(_CONTEXT),
    rows_multiple=slots,
    pad=0,
    share_rows=False,
  )
  before = jax.tree.map(np.array, state.params)
  new, metrics = ipa_step(
    state,
    batch,
    config=config,
    sampling=_SAMPLING,
    ipa_config=_IPA,
    optimizer=optimizer,
    micro_rows=slots,
    num_trajectories=len(played),
    numerics="exact",
  )
  moved = jax.tree.map(lambda a, b: float(np.abs(a - np.array(b)).max()), before, new.params)
  kept = {k: float(metrics[k]) for k in ("loss", "grad_norm", "mismatch_max") if k in metrics}
  return kept | {"moved_max": max(jax.tree.leaves(moved)), "rows": int(batch.tokens.shape[0])}


def differing(
  config: models.ModelConfig, params: Any, played: list[Trajectory], slots: int
) -> tuple[int, int]:
  """How many tokens were sampled, and how many score otherwise than they were sampled."""
  score = jax.jit(
    lambda params, tokens, lengths: exact.exact_logps(config, _SAMPLING, params, tokens, lengths)[
      0
    ],
    compiler_options=exact.COMPILER_OPTIONS,
  )
  rows = [
    (t.tokens[row.tokens], t.call_ids[row.tokens] >= 0, t.logps[row.tokens])
    for t in played
    for row in t.rows
  ]
  found = [0, 0]
  for first in range(0, len(rows), slots):
    part = rows[first : first + slots]
    tokens, lengths = np.zeros((slots, _CONTEXT), np.int32), np.zeros(slots, np.int32)
    for i, (ids, _, _) in enumerate(part):
      tokens[i, : len(ids)], lengths[i] = ids, len(ids)
    logp = np.asarray(score(params, tokens, lengths))
    for i, (ids, sampled, logps) in enumerate(part):
      found[0] += int(sampled.sum())
      found[1] += int((logp[i, : len(ids)] != logps)[sampled].sum())
  return found[0], found[1]


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}")
  slots = _EPISODES.value
  if (len(_ENDS) - 1) * _FAULTS.value > slots:
    raise app.UsageError(f"--faults={_FAULTS.value} of each kind are more than --episodes={slots}")
  memory.keep_freed_memory()
  config = models.PRESETS["micro"]
  optimizer = state_lib.make_optimizer(StageConfig(steps=9, batch=1, learning_rate=1e-3))
  state = state_lib.init_state(config, optimizer, _SEED.value)
  params = state.params
  engine = rollout.Engine(
    config,
    slots=slots,
    max_length=_CONTEXT,
    stop_tokens=(rollout.policy_tokenizer().end,),
    numerics="exact",
  )
  tasks = tasks_of(slots, _FAULTS.value)
  started = time.perf_counter()
  played, stats = play(engine, params, tasks)
  seconds = time.perf_counter() - started
  ends: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in _ENDS}
  wrong = []
  for t in played:
    kind = t.task_id.partition("/")[0]
    ends[kind][f"{t.end_reason} after {t.num_chunks}"] += 1
    reason, counts = _ENDS[kind]
    if t.end_reason != reason or t.num_chunks not in counts:
      wrong.append(t.id)
  sampled, other = differing(config, params, played, slots)
  learnt = update(config, state, optimizer, played, slots)
  print(
    json.dumps(
      {
        "benchmark": "native",
        "agent": "mini-swe-agent 2.4.6",
        "episodes": len(played),
        "faults": _FAULTS.value,
        "seconds": round(seconds, 1),
        "ends": {kind: dict(counts) for kind, counts in ends.items()},
        "unexpected": wrong,
        "invalid": len(stats.invalid),
        "calls": stats.env_steps,
        "chunks": sum(t.num_chunks for t in played),
        "rows": sum(len(t.row_starts) for t in played),
        "sampled_tokens": sampled,
        "differing_tokens": other,
        "update": {k: float(f"{v:.6g}") for k, v in learnt.items()},
        "seed": _SEED.value,
        "load_1min": round(os.getloadavg()[0], 2),
        **summary.provenance(),
      }
    ),
    flush=True,
  )
  sys.exit(1 if wrong or other or learnt["mismatch_max"] else 0)


if __name__ == "__main__":
  app.run(main)
