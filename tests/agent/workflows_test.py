"""Workflows and sub-agents in markdown: where they are read, how they are used, what is refused."""

import os

import pytest

from rome.agent.settings import project_root
from rome.agent.tools.task import AgentDefinition
from rome.agent.workflows import (
  Workflow,
  WorkflowError,
  expand,
  read_agents,
  read_workflows,
)


@pytest.fixture
def house(tmp_path, monkeypatch):
  """Directories of the user and of a project, as functions that write a file there."""
  home, project = tmp_path / "home", tmp_path / "project"
  (project / ".git").mkdir(parents=True)
  monkeypatch.setenv("HOME", str(home))

  def writer(base):
    def write(name, text):
      path = base / ".rome" / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)

    return write

  return project, writer(home), writer(project)


def test_a_projects_definitions_replace_the_users(house):
  project, user, own = house
  user("workflows/review.md", "Review as I like it.")
  user("workflows/plan.md", "---\nname: sketch\ndescription: Plans\n---\nMake a plan.")
  own("workflows/review.md", "---\narguments: [branch]\n---\nReview $branch.")
  own("agents/tester.md", "---\ndescription: Tests\ntools: [shell, read]\n---\nYou test.\n")
  assert read_workflows(project) == {
    "review": Workflow("review", "", ("branch",), "Review $branch."),
    "sketch": Workflow("sketch", "Plans", (), "Make a plan."),
  }
  definition = AgentDefinition("tester", "Tests", "You test.", ("shell", "read"))
  assert read_agents(project) == {"tester": definition}


FLOWS = {
  "plan": Workflow("plan", "", (), "Make a plan; keep $it."),
  "move": Workflow("move", "", ("source", "goal"), "Move $source to ${goal}; it costs $$5."),
}


@pytest.mark.parametrize(
  ("line", "instruction"),
  [
    ("fix /plan", "fix /plan"),
    ("/ is the root", "/ is the root"),
    ("/etc/hosts is wrong", "/etc/hosts is wrong"),
    ("/plan", "Make a plan; keep $it."),
    ("/plan  for $HOME\nnow", "Make a plan; keep $it.\n\nfor $HOME\nnow"),
    ("/move a b", "Move a to b; it costs $5."),
    ("/move 'a b' c  d", "Move a b to c d; it costs $5."),
    ("/move it $goal don't", "Move it to $goal don't; it costs $5."),
  ],
)
def test_expand(line, instruction):
  assert expand(line, FLOWS) == instruction


@pytest.mark.parametrize(
  ("line", "says"),
  [
    ("/none", "no workflow /none; there are: /move, /plan"),
    ("/move a", "/move needs goal: /move <source> <goal>"),
  ],
)
def test_a_line_that_means_nothing(line, says):
  with pytest.raises(WorkflowError, match=says):
    expand(line, FLOWS)


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ("---\ndescription: [\n---\nx", "bad.md: its head is no YAML"),
    ("---\n- a\n---\nx", "its head is no list of keys"),
    ("---\ncolour: red\n---\nx", "no key 'colour'; there are: name, description, tools"),
    ("---\ndescription: x\ntools: shell\n---\nx", "tools must be a list of texts"),
    ("---\ndescription: 3\n---\nx", "description must be a text, not of type int"),
    ("---\ndescription: x\nname: a/b\n---\nx", "name 'a/b' must have letters"),
    ("just text", "an agent needs a description"),
    ("---\ndescription: !!python/object/apply:os.system [id]\n---\nx", "no YAML"),
    ("x" * 70_000, "more than 64000 bytes"),
  ],
)
def test_a_definition_that_is_wrong_names_its_file(house, text, says):
  project, _, own = house
  own("agents/bad.md", text)
  with pytest.raises(WorkflowError, match="bad.md") as error:
    read_agents(project)
  assert says in str(error.value)


def test_files_that_are_none(house):
  project, _, own = house
  own("workflows/bad.md", "x")
  bad = project_root(project) / ".rome/workflows/bad.md"
  bad.unlink()
  os.mkfifo(bad)
  with pytest.raises(WorkflowError, match="bad.md: .*no regular file"):
    read_workflows(project)
  bad.unlink()
  bad.symlink_to("/etc/passwd")
  with pytest.raises(WorkflowError, match="bad.md: it is a link out of the project"):
    read_workflows(project)
