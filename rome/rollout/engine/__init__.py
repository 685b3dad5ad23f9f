"""The generation engine: continuous batching over paged, shared keys and values."""

from rome.rollout.engine.engine import Engine, Stats
from rome.rollout.engine.pool import EnginePool
from rome.rollout.engine.request import QueueFull, Reply, Request, Update

AnyEngine = Engine | EnginePool

__all__ = ["AnyEngine", "Engine", "EnginePool", "QueueFull", "Reply", "Request", "Stats", "Update"]
