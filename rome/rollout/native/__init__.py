"""Agent-native mode: any agent that speaks the OpenAI API plays the episodes, unmodified.

Its process runs in the sandbox of its episode, its calls come to a proxy that answers from the
policy and records them, its exit ends the episode (arXiv:2512.24873, section 2.3). For evaluation
another server may answer in the policy's place (`native.endpoint`).
"""

from rome.rollout.native.agent import AgentFailed, NativeAgent, network_policy
from rome.rollout.native.config import NativeConfig
from rome.rollout.native.external import NoEngine
from rome.rollout.native.proxy import Proxy
from rome.rollout.native.record import Record
from rome.rollout.native.runner import NativeRunner
from rome.rollout.native.sessions import Session, Sessions, Terms
from rome.rollout.native.world import NativeWorld

__all__ = [
  "AgentFailed",
  "NativeAgent",
  "NativeConfig",
  "NativeRunner",
  "NativeWorld",
  "NoEngine",
  "Proxy",
  "Record",
  "Session",
  "Sessions",
  "Terms",
  "network_policy",
]
