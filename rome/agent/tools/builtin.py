"""The tools that every agent has, by one call.

    tools = builtin_tools(Workspace(sandbox))

`rome.agent.tools.task` adds sub-agents, `rome.agent.mcp` tools of servers.
"""

from rome.agent.tools.base import Tool
from rome.agent.tools.files import file_tools
from rome.agent.tools.find import find_tools
from rome.agent.tools.notes import note_tools
from rome.agent.tools.shell import shell_tool
from rome.agent.workspace import Workspace


def builtin_tools(workspace: Workspace) -> list[Tool]:
  """shell, read, write, edit, multi_edit, glob, search, list, todo, memory."""
  return [
    shell_tool(workspace),
    *file_tools(workspace),
    *find_tools(workspace),
    *note_tools(workspace),
  ]
