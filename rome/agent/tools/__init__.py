"""The tools of the agent. What each room has is in its module."""

from rome.agent.tools.base import Tool, ToolResult, parameters

__all__ = ["Tool", "ToolResult", "parameters"]
