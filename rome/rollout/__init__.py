"""Generation engine, episode runner, packing: tasks in, trajectories and batches out."""

from rome.rollout.demonstrations import demonstrate
from rome.rollout.engine import Engine
from rome.rollout.engine import Reply
from rome.rollout.episodes import Episode
from rome.rollout.episodes import EpisodeRunner
from rome.rollout.episodes import RolloutStats
from rome.rollout.episodes import TooManyInvalid
from rome.rollout.experts import ExpertStore
from rome.rollout.instances import TasksConfig
from rome.rollout.instances import TaskSource
from rome.rollout.packing import pack
from rome.rollout.world import AgentConfig
from rome.rollout.world import SandboxConfig
from rome.rollout.world import World

__all__ = [
    "AgentConfig", "Engine", "Episode", "EpisodeRunner", "ExpertStore", "Reply", "RolloutStats", "SandboxConfig", "TaskSource",
    "TasksConfig", "TooManyInvalid", "World", "demonstrate", "pack",
]
