"""What one slow environment costs a batch, with and without a redundant member: one JSON line.

  python -m benchmarks.stragglers [--backend=bubblewrap] [--groups=6] [--rounds=2]

Real sandboxes, the micro model, a scripted agent that runs three shell commands and submits, one
episode in each of `groups` groups. A command sleeps --work seconds, in one environment of a batch
--slowdown times as long. Rounds of the three kinds are interleaved, so that they meet the same
load; `plain` is the batch without a slow environment and without redundancy. Slots suffice for all
members at once, as where environments are the bottleneck.
"""

import json
import statistics
import threading
import time

import gymnasium
import jax
from absl import app, flags

from rome import models, rollout
from rome.agent import Agent
from rome.envs.families import generate
from rome.envs.task import Task
from rome.text import ByteTokenizer
from rome.train.summary import provenance

TURNS = 3
SLOW_TASK = 2  # the instance whose first environment is slow

_BACKENDS = ("auto", "podman", "bubblewrap")

_BACKEND = flags.DEFINE_enum("backend", "bubblewrap", _BACKENDS, "Sandboxes.")

_GROUPS = flags.DEFINE_integer("groups", 6, "Groups a batch.", lower_bound=SLOW_TASK + 1)
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Batches of each kind.", lower_bound=1)
_WORK = flags.DEFINE_float("work", 0.2, "Seconds that a command takes.", lower_bound=0.0)
_SLOWDOWN = flags.DEFINE_float("slowdown", 20.0, "Of the slow environment.", lower_bound=1.0)


class Scripted(Agent):
  """Sleeps in the sandbox whatever the model says, then submits."""

  seconds: float

  def act(self, reply: object) -> list[int] | None:
    call = "submit" if len(self.turns) == TURNS else f"sh sleep {self.seconds}"
    t = self.tokenizer
    return super().act([t.call, *t.encode(call), t.end])


class Makers:
  """Makes agents; the first one of the slow task after `arm` is slow."""

  def __init__(self, world: rollout.World):
    self._world, self._lock, self._armed = world, threading.Lock(), False

  def arm(self) -> None:
    self._armed = True

  def __call__(self, task: Task) -> Agent:
    base = self._world.agent(task)
    env: gymnasium.Env = base.env
    agent = Scripted(env, base.tokenizer, base.system, base.max_turns)
    with self._lock:
      slow = self._armed and task.id == f"count/{SLOW_TASK}"
      if slow:
        self._armed = False
    agent.seconds = _WORK.value * (_SLOWDOWN.value if slow else 1)
    return agent


def main(_: list[str]) -> None:
  groups = _GROUPS.value
  tasks = [generate("count", i) for i in range(groups)]
  config = models.PRESETS["micro"]
  params = jax.jit(models.init_params, static_argnums=0)(config, jax.random.key(0))
  timeout = max(10.0, 2 * _WORK.value * _SLOWDOWN.value)
  sandboxes = rollout.SandboxConfig(
    backend=_BACKEND.value, command_timeout=timeout, deadline=10 * timeout
  )
  agents = rollout.AgentConfig(max_turns=TURNS + 1, max_reply=6, context=192)
  seconds: dict[str, list[float]] = {"plain": [], "straggler": [], "straggler_redundant": []}
  redundant = 0
  with rollout.World(sandboxes, agents, 2 * groups) as world:
    makers = Makers(world)
    stop = (ByteTokenizer().end,)
    engine = rollout.Engine(config, slots=2 * groups, max_length=192, stop_tokens=stop, steps=4)
    runner = rollout.EpisodeRunner(
      engine,
      makers,
      models.Sampling(),
      max_reply=agents.max_reply,
      invalid_cap=0.0,
      patience=rollout.Patience.of(sandboxes),
    )
    for i in range(_ROUNDS.value + 1):  # the first round compiles and starts sandboxes
      for kind, times in seconds.items():
        if not i and kind != "plain":
          continue
        extra = int(kind == "straggler_redundant")
        if kind != "plain":
          makers.arm()
        start = time.perf_counter()
        done, stats = runner.run(
          params, jax.random.key(i), 0, tasks.__getitem__, 0, groups, rollout.Grouping(1, extra)
        )
        if i:
          times.append(time.perf_counter() - start)
          redundant += stats.redundant
        if len(done) != groups or stats.invalid:
          raise AssertionError(f"{len(done)} trajectories, {len(stats.invalid)} invalid")
    backend = world.backend
  runner.close()
  medians = {kind: statistics.median(times) for kind, times in seconds.items()}
  print(
    json.dumps(
      {
        "benchmark": "stragglers",
        "backend": backend,
        "groups": groups,
        "work_s": _WORK.value,
        "slowdown": _SLOWDOWN.value,
        "rounds": _ROUNDS.value,
        **{f"{kind}_s": round(value, 3) for kind, value in medians.items()},
        "straggler_costs": round(medians["straggler"] / medians["plain"], 3),
        "straggler_redundant_costs": round(medians["straggler_redundant"] / medians["plain"], 3),
        "redundant_members": redundant,
        **provenance(),
      }
    )
  )


if __name__ == "__main__":
  app.run(main)
