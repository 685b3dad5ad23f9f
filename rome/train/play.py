"""Plays numbered task instances under given weights: what training and evaluation share."""

from collections.abc import Sequence
from typing import Any

import chex
import jax

from rome import models, rollout
from rome.evals.metrics import wilson_interval
from rome.train.config import RunConfig
from rome.trajectory import Trajectory

# Streams of randomness under a run's key; the parameters take 0.
RL_STREAM, EVAL_STREAM, SFT_STREAM = 1, 2, 3


class Player:
  """Sandboxes, engine and tasks of one run. A context manager.

  Raises:
    SandboxError: no sandbox can be had; the message says what to install.
    TaskError: there are no usable tasks.
  """

  def __init__(self, config: RunConfig, model: models.ModelConfig):
    self.source = rollout.TaskSource(config.tasks)
    self.world = rollout.World(config.sandbox, config.agent, config.engine.slots)
    self.tokenizer = self.world.tokenizer
    engine = rollout.Engine(
      model,
      slots=config.engine.slots,
      max_length=config.agent.context,
      stop_tokens=(self.tokenizer.end,),
      steps=config.engine.steps,
      prefill_tokens=config.engine.prefill_tokens,
      numerics=config.numerics,
    )
    self._runner = rollout.EpisodeRunner(
      engine,
      self.world.agent,
      config.sampling,
      max_reply=config.agent.max_reply,
      env_deadline=config.sandbox.deadline,
      invalid_cap=config.sandbox.invalid_cap,
    )

  def __enter__(self) -> "Player":
    return self

  def __exit__(self, *_: object) -> None:
    self.world.close()  # first: it also ends what a stuck environment waits for
    self._runner.close()

  def play(
    self,
    params: chex.ArrayTree,
    key: chex.PRNGKey,
    split: str,
    first: int,
    count: int,
    stream: int,
    version: int,
  ) -> tuple[list[Trajectory], rollout.RolloutStats]:
    """Plays instances `first` to `first + count - 1` of a split once each.

    Args:
      params: weights to sample under.
      key: the run's key.
      split: "train" or "held_out".
      first: number of the first instance.
      count: instances.
      stream: RL_STREAM or EVAL_STREAM; the same stream and number draw the same randomness.
      version: version number of `params`.
    Returns:
      Valid trajectories sorted by id, and what they took.
    """
    tasks = [self.source.get(split, first + i) for i in range(count)]
    episodes = [
      rollout.Episode(f"{task.id}#{first + i}", task, first + i) for i, task in enumerate(tasks)
    ]
    return self._runner.run(params, jax.random.fold_in(key, stream), version, episodes)

  def evaluate(
    self, params: chex.ArrayTree, key: chex.PRNGKey, instances: int
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
