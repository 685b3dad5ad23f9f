"""A workspace in a real sandbox: one sandbox for all tests here, emptied before each."""

import pytest

from rome.agent.tools.builtin import builtin_tools
from rome.agent.workspace import Workspace
from rome.envs.sandbox import make_sandbox


@pytest.fixture(scope="session")
def _shared():
  with make_sandbox(backend="bubblewrap") as sandbox:
    yield sandbox


@pytest.fixture
def sandbox(_shared):
  _shared.reset()
  return _shared


@pytest.fixture
def workspace(sandbox):
  found = Workspace(sandbox)
  yield found
  found.close()


@pytest.fixture
def tools(workspace):
  """Each tool's work, by name: tools["read"](path="a")."""
  return {tool.name: _by_keyword(tool) for tool in builtin_tools(workspace)}


def _by_keyword(tool):
  return lambda **arguments: tool.run(arguments)
