"""Generation engine, episode runner, packing: tasks in, trajectories and batches out."""

from rome.agent.custom import CustomError
from rome.agent.world import AgentConfig, SandboxConfig, World, policy_tokenizer
from rome.rollout.again import ask_again, backend_name, member_of
from rome.rollout.crew import MAX_MEMBERS, RolloutStats, Starts, TooManyInvalid
from rome.rollout.demonstrations import demonstrate
from rome.rollout.engine import AnyEngine, Engine, EnginePool, QueueFull, Reply, Request, Update
from rome.rollout.episodes import EpisodeRunner, initial
from rome.rollout.experts import ExpertStore
from rome.rollout.groups import Grouping, Member
from rome.rollout.instances import TasksConfig, TaskSource
from rome.rollout.lanes import Patience, TooManyAbandoned
from rome.rollout.native import NativeConfig, NativeWorld, NoEngine
from rome.rollout.packing import occupancy, pack
from rome.rollout.recorder import Episode
from rome.rollout.resampling import Resampler, ResamplingConfig
from rome.rollout.scaffold import scaffold_digest
from rome.rollout.starts import Start
from rome.rollout.stream import Snapshot, Stream
from rome.rollout.timeline import NO_TIMELINE, Timeline, read_marks
from rome.rollout.tools import tool_use
from rome.rollout.workers import Workers, WorkersConfig

__all__ = [
  "AgentConfig",
  "AnyEngine",
  "CustomError",
  "Engine",
  "EnginePool",
  "Episode",
  "EpisodeRunner",
  "ExpertStore",
  "Grouping",
  "MAX_MEMBERS",
  "Member",
  "NO_TIMELINE",
  "NativeConfig",
  "NativeWorld",
  "NoEngine",
  "Patience",
  "QueueFull",
  "Reply",
  "Request",
  "Resampler",
  "ResamplingConfig",
  "RolloutStats",
  "SandboxConfig",
  "Snapshot",
  "Start",
  "Starts",
  "Stream",
  "TaskSource",
  "TasksConfig",
  "Timeline",
  "TooManyAbandoned",
  "TooManyInvalid",
  "Update",
  "Workers",
  "WorkersConfig",
  "World",
  "ask_again",
  "backend_name",
  "demonstrate",
  "initial",
  "member_of",
  "occupancy",
  "pack",
  "read_marks",
  "policy_tokenizer",
  "scaffold_digest",
  "tool_use",
]
