"""Generation engine, episode runner, packing: tasks in, trajectories and batches out."""

from rome.rollout.demonstrations import demonstrate
from rome.rollout.engine import Engine, QueueFull, Reply, Request, Update
from rome.rollout.episodes import Episode, EpisodeRunner, RolloutStats, TooManyInvalid
from rome.rollout.experts import ExpertStore
from rome.rollout.instances import TasksConfig, TaskSource
from rome.rollout.packing import pack
from rome.rollout.world import AgentConfig, SandboxConfig, World

__all__ = [
  "AgentConfig",
  "Engine",
  "Episode",
  "EpisodeRunner",
  "ExpertStore",
  "QueueFull",
  "Reply",
  "Request",
  "RolloutStats",
  "SandboxConfig",
  "TaskSource",
  "TasksConfig",
  "TooManyInvalid",
  "Update",
  "World",
  "demonstrate",
  "pack",
]
