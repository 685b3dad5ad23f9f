"""The agent: system prompt, tool-call parsing, the episode loop. Never imports jax."""

from rome.agent.agent import Agent
from rome.agent.parse import MalformedCall, ToolCall, parse_reply

__all__ = ["Agent", "MalformedCall", "ToolCall", "parse_reply"]
