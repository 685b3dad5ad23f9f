"""The agent: system prompt, tool-call parsing, the episode loop. Never imports jax."""

from rome.agent.agent import Agent, NewRow
from rome.agent.parse import MalformedCall, ToolCall, parse_reply

__all__ = ["Agent", "MalformedCall", "NewRow", "ToolCall", "parse_reply"]
