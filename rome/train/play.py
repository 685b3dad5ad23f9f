"""Plays numbered task instances under given weights: what training and evaluation share."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax

from rome import models, rollout
from rome.evals.metrics import wilson_interval
from rome.rollout import custom
from rome.train import division, placement, processes
from rome.train.config import MAX_CHUNKS, RLConfig, RunConfig
from rome.trajectory import Trajectory

# Streams of randomness under a run's key; the parameters take 0.
RL_STREAM, EVAL_STREAM, SFT_STREAM, STARTS_STREAM = 1, 2, 3, 4
ONE = rollout.Grouping()  # each instance is played once


def make_engine(config: RunConfig, model: models.ModelConfig) -> rollout.Engine:
  """A generation engine of a run's settings on one device, without weights."""
  return rollout.Engine(model, slots=config.engine.slots, **_engine_settings(config))


def make_engines(config: RunConfig, model: models.ModelConfig) -> rollout.AnyEngine:
  """What generates in a run, without weights: one engine, or one on each of several devices.

  Raises:
    ConfigError: there are fewer devices.
  """
  devices = division.engine_devices(config.engine)
  if len(devices) == 1:
    return make_engine(config, model)
  slots = config.engine.slots // len(devices)
  return rollout.EnginePool(model, devices, slots=slots, **_engine_settings(config))


def _engine_settings(config: RunConfig) -> dict[str, Any]:
  return {
    "max_length": config.agent.context,
    "stop_tokens": (rollout.policy_tokenizer().end,),
    "steps": config.engine.steps,
    "prefill_tokens": config.engine.prefill_tokens,
    "numerics": config.numerics,
  }


class Player:
  """Sandboxes, engine and tasks of one run. A context manager.

  Of several processes each plays its share, and all get everything. With `native.endpoint` there is
  no engine, and neither sizes nor weights are needed.

  Raises:
    SandboxError: no sandbox can be had; the message says what to install.
    TaskError: there are no usable tasks.
    CustomError: an import path cannot be used.
    ConfigError: there are fewer devices than `engine.devices`.
  """

  def __init__(
    self,
    config: RunConfig,
    model: models.ModelConfig | None,
    timeline: rollout.Timeline = rollout.NO_TIMELINE,
  ):
    self.source = rollout.TaskSource(config.tasks)
    self.world: rollout.World | rollout.Workers
    make_runner: Callable[..., rollout.EpisodeRunner] = rollout.EpisodeRunner
    if config.workers.address:
      self.world = rollout.Workers(config.workers, config.sandbox, config.agent, config.tasks.env)
    elif config.agent.mode == "native":
      native = rollout.NativeWorld(
        config.sandbox,
        config.agent,
        config.native,
        config.sampling,
        config.engine.slots,
        config.tasks.env,
      )
      self.world, make_runner = native, native.runner
    else:
      self.world = rollout.World(
        config.sandbox, config.agent, config.engine.slots, config.tasks.env
      )
    self.tokenizer, self._lanes = self.world.tokenizer, config.engine.slots
    if config.native.endpoint:
      engine: rollout.AnyEngine | rollout.NoEngine = rollout.NoEngine(config.engine.slots)
    else:
      assert model is not None
      engine = make_engines(config, model)
    self._runner = make_runner(
      engine,
      self._agent_maker(config.reward),
      config.sampling,
      max_reply=config.agent.max_reply,
      invalid_cap=config.sandbox.invalid_cap,
      patience=rollout.Patience.of(config.sandbox),
      timeline=timeline,
      max_rows=config.rl.micro_rows,
    )
    self._max_rows = min(config.sft.micro_rows, config.rl.micro_rows)

  def _agent_maker(self, reward: str) -> Callable[[Any], Any]:
    """What makes the agents of episodes, rewarded by the user's function where there is one."""
    make = self.world.agent
    if not reward:
      return make
    judge = custom.load_reward(reward)
    return lambda task: custom.Rewarded(make(task), task, judge)

  def __enter__(self) -> "Player":
    return self

  def __exit__(self, *_: object) -> None:
    self.world.close()  # first: it also ends what a stuck environment waits for
    self._runner.close()

  def play(
    self,
    params: chex.ArrayTree | None,
    key: chex.PRNGKey,
    split: str,
    first: int,
    count: int,
    stream: int,
    version: int,
    grouping: rollout.Grouping = ONE,
    starts: rollout.Starts = rollout.initial,
  ) -> tuple[list[Trajectory], rollout.RolloutStats]:
    """Plays instances of a split, from `first` on, each by a group.

    Args:
      params: weights to sample under; None with `native.endpoint`.
      key: the run's key.
      split: "train" or "held_out".
      first: number of the first instance.
      count: instances; groups that are replaced take further ones.
      stream: RL_STREAM or EVAL_STREAM; the same stream and number draw the same randomness.
      version: version number of `params`.
      grouping: members of a group, by default one.
      starts: where a member begins.
    Returns:
      Valid trajectories sorted by id, and what they took.
    """
    tasks = functools.partial(self.source.get, split)
    params, key = placement.local((params, key))
    key = jax.random.fold_in(key, stream)
    first, count = processes.share(first, count)
    played = self._runner.run(params, key, version, tasks, first, count, grouping, starts)
    return processes.together(*played)

  def demonstrate(self, count: int) -> list[Trajectory]:
    """Reference solutions of training instances 0 to `count` - 1, in order.

    Raises:
      TaskError: one does not pass its tests, or does not fit into the context.
    """
    first, count = processes.share(0, count)
    tasks = [self.source.get("train", i) for i in range(first, first + count)]
    demos = rollout.demonstrate(tasks, self.world, self._lanes, self._max_rows)
    return [demo for part in processes.exchange(demos) for demo in part]

  def stream(
    self,
    key: chex.PRNGKey,
    start: rollout.Snapshot,
    config: RLConfig,
    updates: int,
    starts: rollout.Starts,
    lent: Sequence[jax.Device] = (),
  ) -> rollout.Stream:
    """Plays training instances while training goes on.

    Args:
      key: the run's key.
      start: where to begin.
      config: reinforcement learning.
      updates: how many are left.
      starts: where a member begins.
      lent: devices that do not generate while an update is computed.
    """
    return self._runner.stream(
      jax.random.fold_in(placement.local(key), RL_STREAM),
      functools.partial(self.source.get, "train"),
      start,
      grouping(config),
      config.groups,
      config.max_staleness,
      updates,
      starts,
      lent,
    )

  def evaluate(
    self, params: chex.ArrayTree | None, key: chex.PRNGKey, instances: int
  ) -> tuple[dict[str, Any], list[Trajectory]]:
    """Success on held-out instances 0 to `instances` - 1.

    Returns:
      A dict of figures, and the trajectories.
    """
    trajectories, _ = self.play(params, key, "held_out", 0, instances, EVAL_STREAM, 0)
    by_family = {
      family: [t.success for t in trajectories if t.family == family]
      for family in sorted({t.family for t in trajectories})
    }
    result = _rate([t.success for t in trajectories])
    families = {family: _rate(wins) for family, wins in by_family.items()}
    return result | {"families": families}, trajectories


def make_experts(config: RunConfig) -> rollout.ExpertStore | rollout.Resampler:
  """The experts of a run, none yet.

  Raises:
    TaskError: there are no usable tasks.
  """
  if config.resampling.mode == "off":
    return rollout.ExpertStore(config.experts.capacity, config.agent.context)
  return rollout.Resampler(
    config.resampling,
    rollout.TaskSource(config.tasks).training_tasks,
    config.agent.context,
    MAX_CHUNKS,
    config.agent.max_reply,
    jax.random.fold_in(jax.random.key(config.seed), STARTS_STREAM),
  )


def grouping(config: RLConfig) -> rollout.Grouping:
  """How training plays its instances."""
  refills = int(config.filter_cap * config.groups) if config.filter_groups else 0
  return rollout.Grouping(config.group_size, config.group_redundancy, refills)


def _rate(wins: Sequence[bool]) -> dict[str, Any]:
  """{"success", "interval" (Wilson, 95 %), "n"}."""
  return {
    "success": sum(wins) / len(wins),
    "interval": list(wilson_interval(sum(wins), len(wins))),
    "n": len(wins),
  }


def transcript(trajectory: Trajectory, phase: str, step: int) -> dict[str, Any]:
  """The text view of one episode, as a row of episodes.jsonl."""
  turns = [
    {"action": t.action, "observation": t.observation, "exit_code": t.exit_code}
    for t in trajectory.turns
  ]
  return {
    "phase": phase,
    "step": step,
    "task_id": trajectory.task_id,
    "family": trajectory.family,
    "instruction": trajectory.instruction,
    "success": int(trajectory.success),
    "end_reason": trajectory.end_reason,
    "turns": turns,
  }


def transcripts(
  trajectories: Sequence[Trajectory], count: int, phase: str, step: int
) -> list[dict[str, Any]]:
  """The text views of `count` episodes, evenly spread over all."""
  stride = max(len(trajectories) // count, 1)
  return [transcript(t, phase, step) for t in trajectories[::stride][:count]]
