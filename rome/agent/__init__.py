"""The agent: system prompt, tool-call parsing, the episode loop. Never imports jax."""

from rome.agent.agent import Agent
from rome.agent.parse import MalformedCall
from rome.agent.parse import parse_reply
from rome.agent.parse import ToolCall

__all__ = ["Agent", "MalformedCall", "ToolCall", "parse_reply"]
