"""Procedures and sub-agents that users write as markdown with front matter.

    .rome/workflows/review.md                 .rome/agents/tester.md
    ---                                       ---
    description: Review a change              description: Runs the tests and says what fails
    arguments: [branch]                       tools: [shell, read]
    ---                                       ---
    Review the branch $branch. First ...      You run tests. ...

`read_workflows` and `read_agents` find them in `~/.rome` and in the project's `.rome`; a project's
replaces a user's of the same name. `expand` turns "/review main" into the instruction.

They are texts for the model and no programs: what they can do is what the tools and permissions of
the agent let it do.

Left out: steps that the program runs by itself, includes, conditions, a model of its own for a
sub-agent, since a request's model is that of its conversation.
"""

import dataclasses
import os
import pathlib
import re
import shlex
import string
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import yaml

from rome.agent.settings import project_root, user_directory
from rome.agent.tools.task import AgentDefinition
from rome.files import read_regular

MAX_FILE = 64_000  # bytes
_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,63}", re.ASCII)
_T = TypeVar("_T")


class WorkflowError(ValueError):
  """A definition is wrong, or is used in a wrong way; the message says what to mend."""


@dataclasses.dataclass(frozen=True)
class Workflow:
  """A named procedure.

  Attributes:
    name: what stands behind the slash.
    description: for a list of them.
    arguments: names of what it takes; `$name` in the text.
    text: the instruction.
  """

  name: str
  description: str
  arguments: tuple[str, ...]
  text: str


def read_workflows(directory: str | os.PathLike[str]) -> dict[str, Workflow]:
  """The workflows that there are in a directory, by name.

  Raises:
    WorkflowError: a file is wrong.
  """

  def make(name: str, head: dict[str, Any], text: str) -> Workflow:
    arguments = tuple(_texts(head, "arguments"))
    for argument in arguments:
      if not re.fullmatch(r"[a-z_][a-z0-9_]*", argument):
        raise WorkflowError(f"argument {argument!r} must have the form of a variable, a-z, 0-9, _")
    return Workflow(name, _text(head, "description"), arguments, text)

  return _read_all(directory, "workflows", ("name", "description", "arguments"), make)


def read_agents(directory: str | os.PathLike[str]) -> dict[str, AgentDefinition]:
  """The sub-agents that there are in a directory, by name.

  Raises:
    WorkflowError: a file is wrong.
  """

  def make(name: str, head: dict[str, Any], text: str) -> AgentDefinition:
    if not (description := _text(head, "description")):
      raise WorkflowError("an agent needs a description, by which it is chosen")
    return AgentDefinition(name, description, text, tuple(_texts(head, "tools")))

  return _read_all(directory, "agents", ("name", "description", "tools"), make)


def expand(line: str, workflows: Mapping[str, Workflow]) -> str:
  """The instruction that a line means: "/name arguments" by its workflow, others as they are.

  Arguments are words as a shell takes them; the last one takes the rest. A workflow that names none
  has what follows it at its end. `$$` is a dollar.

  Raises:
    WorkflowError: there is no such workflow, or arguments are missing.
  """
  found = re.match(r"/([\w-]+)(?:\s+|$)", line)
  if not found:
    return line
  workflow, rest = workflows.get(found[1]), line[found.end() :].strip()
  if workflow is None:
    known = ", ".join(f"/{name}" for name in sorted(workflows)) or "none"
    raise WorkflowError(f"no workflow /{found[1]}; there are: {known}")
  names = workflow.arguments
  values = dict(zip(names, _split(rest, len(names)) if names else [], strict=False))
  if missing := [name for name in names if name not in values]:
    usage = " ".join(f"<{name}>" for name in names)
    raise WorkflowError(f"/{workflow.name} needs {', '.join(missing)}: /{workflow.name} {usage}")
  text = string.Template(workflow.text).safe_substitute(values)
  return text if names or not rest else f"{text}\n\n{rest}"


def _split(text: str, count: int) -> list[str]:
  """At most count words; the last one is all the rest."""
  try:
    words = shlex.split(text)
  except ValueError:  # a single quote, as in don't
    words = text.split()
  return words if len(words) <= count else [*words[: count - 1], " ".join(words[count - 1 :])]


def _read_all(
  directory: str | os.PathLike[str],
  kind: str,
  keys: tuple[str, ...],
  make: Callable[[str, dict[str, Any], str], _T],
) -> dict[str, _T]:
  """All definitions of a kind, the user's first, so that the project's replace them."""
  found: dict[str, _T] = {}
  project = project_root(directory) / ".rome"
  for base in (user_directory(), project):
    for path in sorted((base / kind).glob("*.md")):
      try:
        if base == project and not os.path.realpath(path).startswith(f"{project.parent}/"):
          raise WorkflowError("it is a link out of the project; put the file there")
        head, text = front_matter(path)
        if unknown := [key for key in head if key not in keys]:
          raise WorkflowError(f"no key {unknown[0]!r}; there are: {', '.join(keys)}")
        name = _text(head, "name") or path.stem
        if not _NAME.fullmatch(name):
          raise WorkflowError(f"name {name!r} must have letters, digits, _ and - only, at most 64")
        found[name] = make(name, head, text)
      except WorkflowError as error:
        raise WorkflowError(f"{path}: {error}") from None
  return found


def front_matter(path: pathlib.Path) -> tuple[dict[str, Any], str]:
  """The keys at the head of a markdown file, and what follows.

  Raises:
    WorkflowError: the file cannot be read, or its head is no mapping.
  """
  try:
    text = read_regular(path, MAX_FILE).decode().replace("\r\n", "\n")
  except (OSError, ValueError) as error:
    raise WorkflowError(f"it cannot be read: {error}") from None
  found = re.match(r"---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", text, re.DOTALL | re.MULTILINE)
  if not found:
    return {}, text.strip()
  try:
    head = yaml.safe_load(found[1]) or {}
  except (yaml.YAMLError, RecursionError) as error:
    raise WorkflowError(f"its head is no YAML: {' '.join(str(error).split())[:300]}") from None
  if not isinstance(head, dict):
    raise WorkflowError("its head is no list of keys and values")
  return head, text[found.end() :].strip()


def _text(head: Mapping[str, Any], key: str) -> str:
  value = head.get(key, "")
  if not isinstance(value, str):
    raise WorkflowError(f"{key} must be a text, not of type {type(value).__name__}")
  return value.strip()


def _texts(head: Mapping[str, Any], key: str) -> list[str]:
  value = head.get(key, [])
  if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
    raise WorkflowError(f"{key} must be a list of texts like [a, b]")  # what it is may be huge
  return value
