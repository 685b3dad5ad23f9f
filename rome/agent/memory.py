"""Instructions that stand in files: ROME.md of the machine, the user, the project and directories.

    text = memory(directory)  # for the end of the system prompt; "" where there is none

From far to near, so that the nearer one is read later, and counts where they contradict each other:

    global     $ROME_GLOBAL_MEMORY, or /etc/rome/ROME.md
    user       ~/.rome/ROME.md
    project    ROME.md at the root of the project
    directory  ROME.md of each directory from there down to the one the agent works in

A line `@path` is replaced by that file, relative to the file it stands in, `MAX_DEPTH` deep, and
only from the directory tree of the first one, links followed, and `MAX_IMPORTS` of one source.
What does not fit is left out from afar, and the text says so. These files are read from this host,
when a session begins; notes that the agent takes itself are `rome.agent.tools`.

Left out: memory that changes during a session, as what was rendered stays.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping

from rome.agent.settings import project_root, user_directory

FILE = "ROME.md"
MAX_DEPTH = 4  # of imports
MAX_IMPORTS = 100  # of one source, those of its imports counted in
MAX_FILE = 32_000  # characters of one source, imports and all
MAX_TOTAL = 64_000

_HEAD = """\
# Instructions from files
Their owners wrote these for you; follow them. They are listed from far to near: where two \
contradict each other, the later one counts, and what the user says in the conversation counts \
more than any of them."""


@dataclasses.dataclass(frozen=True)
class Source:
  """One file of instructions.

  Attributes:
    scope: "global", "user", "project" or "directory".
    name: path, as the model is shown it.
    text: with its imports.
  """

  scope: str
  name: str
  text: str


def memory(directory: str | os.PathLike[str], environment: Mapping[str, str] | None = None) -> str:
  """All instructions that count in a directory, with their sources; "" where there are none.

  Args:
    directory: where the agent works.
    environment: os.environ where None.
  """
  return assemble(list(sources(directory, environment)))


def sources(
  directory: str | os.PathLike[str], environment: Mapping[str, str] | None = None
) -> Iterator[Source]:
  """The files that there are, from far to near."""
  environment = os.environ if environment is None else environment
  here = pathlib.Path(directory).resolve()
  root = project_root(here)
  machine = pathlib.Path(environment.get("ROME_GLOBAL_MEMORY") or f"/etc/rome/{FILE}")
  files = [("global", str(machine), machine), ("user", f"~/.rome/{FILE}", user_directory() / FILE)]
  down = [path for path in reversed((here, *here.parents)) if path.is_relative_to(root)]
  for path in down:
    file = path / FILE
    scope = "project" if path == root else "directory"
    files.append((scope, str(file.relative_to(root)), file))
  for scope, name, file in files:
    if scope in ("project", "directory") and not _real(file).is_relative_to(root):
      yield Source(scope, name, "(not read: it is a link out of the project)")
    elif text := _read(file, file.parent.resolve(), (), itertools.count()).strip():
      yield Source(scope, name, text)


def assemble(found: list[Source]) -> str:
  """Sources as one text, the farthest left out where they are too long together."""
  kept, size = [], 0
  for source in reversed(found):
    size += len(source.text)
    if size > MAX_TOTAL:
      break
    kept.append(source)
  if not found:
    return ""
  parts = [_HEAD]
  for source in found[: len(found) - len(kept)]:
    parts.append(f"({source.scope}: {source.name} is left out: all together are too long)")
  for source in reversed(kept):
    text = source.text.replace("</instructions", "<\\/instructions")
    parts.append(f'<instructions from="{source.scope}: {source.name}">\n{text}\n</instructions>')
  return "\n\n".join(parts)


def _real(path: pathlib.Path) -> pathlib.Path:
  """Without links; `Path.resolve` raises where they go in a circle."""
  return pathlib.Path(os.path.realpath(path))


def _read(
  file: pathlib.Path,
  tree: pathlib.Path,
  above: tuple[pathlib.Path, ...],
  imports: Iterator[int],
) -> str:
  """A file with its imports, "" where it is not there; cut at MAX_FILE."""
  if not os.path.isfile(file):  # a pipe would never end
    return ""
  try:
    with open(file, encoding="utf-8", errors="replace") as opened:
      text = opened.read(MAX_FILE + 1)
  except OSError:
    return ""
  lines, fenced = [], False
  for line in text.splitlines():
    fenced ^= line.lstrip().startswith("```")
    if line.startswith("@") and len(line.split()) == 1 and not fenced:
      line = _import(line[1:], file, tree, above, imports)
    lines.append(line)
  text = "\n".join(lines)
  return text if len(text) <= MAX_FILE else text[:MAX_FILE] + "\n(cut here: too long)"


def _import(
  name: str,
  file: pathlib.Path,
  tree: pathlib.Path,
  above: tuple[pathlib.Path, ...],
  imports: Iterator[int],
) -> str:
  """What stands in the place of a line @name, or why it is not there."""
  try:
    path = _real(file.parent / name)
  except (OSError, ValueError):
    return "(a line @ is not read: it names no path)"
  above = (*above, _real(file))
  if not path.is_relative_to(tree):
    return f"(@{name} is not read: it is outside of {tree.name}/)"
  if path in above:
    return f"(@{name} is not read: it imports itself)"
  if len(above) > MAX_DEPTH:
    return f"(@{name} is not read: imports go {MAX_DEPTH} deep)"
  if not os.path.isfile(path):
    return f"(@{name} is not read: there is no such file)"
  if next(imports) >= MAX_IMPORTS:  # a few files that import each other often are millions
    return f"(@{name} is not read: there are more than {MAX_IMPORTS} imports)"
  return _read(path, tree, above, imports)
