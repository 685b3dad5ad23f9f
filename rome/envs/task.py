"""Tasks: an instruction, the files an episode starts with, tests that score it, a solution.

A task is data. It is drawn from a procedural family (`rome.envs.families`) or kept as a directory:

    task.toml     instruction = "..."; optional: id, family, a table [modes] of "path" = "octal"
    files/        what the agent finds in its working directory (optional)
    tests.sh      bash, run as root once the agent's processes are gone; exit 0 = solved
    solution.sh   reference solution, one shell command a line (needed for admission only)

A `Task` checks itself when it is made, so one without tests, or with a file that would land outside
the working directory, cannot exist. Left out: images and build commands (every task runs in the
sandbox's own image), binary test suites, and empty directories (put a file in them).
"""

import dataclasses
import json
import os
import pathlib
import re
import stat
import tomllib
from collections.abc import Mapping
from typing import Any

DEFAULT_MODE = 0o644
EXECUTABLE_MODE = 0o755
MAX_INSTRUCTION = 65536  # characters; also the bound of the environment's text spaces
_FAMILY = re.compile(r"[a-z][a-z0-9_]*")
_TOML_KEYS = {"id", "family", "instruction", "modes"}


class TaskError(ValueError):
  """A task that cannot be used; the message is one line: what is wrong and how to mend it."""


@dataclasses.dataclass(frozen=True)
class TaskFile:
  """One file of a task: its bytes and its permission bits."""

  data: bytes
  mode: int = DEFAULT_MODE


@dataclasses.dataclass(frozen=True)
class Task:
  """One instance.

  Attributes:
    id: unique name, `family/seed` for generated tasks.
    family: the group that metrics are reported by.
    instruction: what the agent reads.
    files: path relative to the working directory -> its content and mode.
    tests: bash script; exit 0 means solved. The agent never sees it.
    solution: shell commands that solve the task, without the final submit. Empty = none known.

  Raises:
    TaskError: on an empty instruction, empty tests, or a path that leaves the working directory.
  """

  id: str
  family: str
  instruction: str
  files: Mapping[str, TaskFile]
  tests: str
  solution: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    name = f"task {self.id!r}"
    if not self.id or not self.id.isprintable():
      raise TaskError(f"{name}: the id must be printable text on one line; set `id` in task.toml")
    if not _FAMILY.fullmatch(self.family):
      raise TaskError(
        f"{name}: family {self.family!r} must be lower-case letters, digits and '_'; rename it"
      )
    if not self.instruction.strip():
      raise TaskError(f"{name}: the instruction is empty; say in it what the agent has to do")
    if len(self.instruction) > MAX_INSTRUCTION:
      raise TaskError(f"{name}: the instruction is longer than {MAX_INSTRUCTION} characters")
    if not _has_code(self.tests):
      raise TaskError(f"{name}: tests.sh holds no command, so it would pass anything; write tests")
    for command in self.solution:
      if not command.strip() or "\n" in command:
        raise TaskError(f"{name}: solution command {command!r} must be one line that is not empty")
    _check_paths(name, self.files)


def _has_code(script: str) -> bool:
  lines = (line.strip() for line in script.splitlines())
  return any(line and not line.startswith("#") for line in lines)


def _check_paths(name: str, files: Mapping[str, TaskFile]) -> None:
  for path, file in files.items():
    parts = path.split("/")
    if not path.isprintable() or any(part in ("", ".", "..") for part in parts):
      raise TaskError(
        f"{name}: file {path!r} must be a plain path inside the working directory"
        " (relative, no '.' or '..' part, printable); rename it"
      )
    if not 0 <= file.mode <= 0o777:
      raise TaskError(f"{name}: file {path!r} has mode {file.mode:o}; use 0 to 777 (octal)")
    for end in range(1, len(parts)):
      if "/".join(parts[:end]) in files:
        raise TaskError(f"{name}: {'/'.join(parts[:end])!r} is both a file and a directory")


def load_task(directory: str | os.PathLike[str]) -> Task:
  """Reads a task directory (layout: see the module's docstring).

  A file's mode is the one in [modes], else 755 where it is executable on disk, else 644, so that
  the task does not depend on the umask it was checked out under.

  Raises:
    TaskError: where a part is missing, unreadable or malformed.
  """
  root = pathlib.Path(directory)
  if not root.is_dir():
    raise TaskError(f"task directory {str(root)!r} does not exist; check the path")
  table = _read_table(root / "task.toml")
  modes = _parse_modes(root, table.get("modes", {}))
  files = _read_files(root / "files", modes)
  for path in modes:
    if path not in files:
      raise TaskError(f"{root}/task.toml: [modes] names {path!r}, but files/{path} is not there")
  if not (root / "tests.sh").is_file():
    raise TaskError(f"task directory {str(root)!r} has no tests.sh; write one, exit 0 = solved")
  solution = _read_text(root / "solution.sh") if (root / "solution.sh").is_file() else ""
  lines = (line.strip() for line in solution.splitlines())
  return Task(
    id=table.get("id", root.resolve().name),
    family=table.get("family", "custom"),
    instruction=table.get("instruction", ""),
    files=files,
    tests=_read_text(root / "tests.sh"),
    solution=tuple(line for line in lines if line and not line.startswith("#")),
  )


def _read_table(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise TaskError(f'{path} is missing; write one with at least: instruction = "..."')
  try:
    table = tomllib.loads(_read_text(path))
  except tomllib.TOMLDecodeError as error:
    raise TaskError(f"{path} is not valid TOML: {error}") from None
  for key, value in table.items():
    if key not in _TOML_KEYS:
      raise TaskError(f"{path}: unknown key {key!r}; the keys are {', '.join(sorted(_TOML_KEYS))}")
    wanted = dict if key == "modes" else str
    if not isinstance(value, wanted):
      raise TaskError(f"{path}: {key} must be a {'table' if wanted is dict else 'string'}")
  return table


def _parse_modes(root: pathlib.Path, table: dict[str, Any]) -> dict[str, int]:
  for path, mode in table.items():
    if not isinstance(mode, str) or not re.fullmatch(r"[0-7]{3}", mode):
      raise TaskError(f"{root}/task.toml: mode of {path!r} must be three octal digits as a string")
  return {path: int(mode, 8) for path, mode in table.items()}


def _read_files(root: pathlib.Path, modes: Mapping[str, int]) -> dict[str, TaskFile]:
  files = {}
  for path in sorted(root.rglob("*")):
    info = path.lstat()
    if stat.S_ISDIR(info.st_mode):
      continue
    if not stat.S_ISREG(info.st_mode):
      raise TaskError(f"{path} is not a regular file; a task holds only files and directories")
    name = path.relative_to(root).as_posix()
    default = EXECUTABLE_MODE if info.st_mode & stat.S_IXUSR else DEFAULT_MODE
    try:
      files[name] = TaskFile(path.read_bytes(), modes.get(name, default))
    except OSError as error:
      raise TaskError(f"{path} cannot be read: {error.strerror}") from None
  return files


def _read_text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except OSError as error:
    raise TaskError(f"{path} cannot be read: {error.strerror}") from None
  except UnicodeDecodeError:
    raise TaskError(f"{path} is not UTF-8 text; re-encode it") from None


def save_task(task: Task, directory: str | os.PathLike[str]) -> None:
  """Writes `task` as a new directory that `load_task` reads back as an equal task.

  Raises:
    TaskError: where the directory already holds something.
  """
  root = pathlib.Path(directory)
  if root.exists() and (not root.is_dir() or any(root.iterdir())):
    raise TaskError(f"{str(root)!r} already holds something; give a new or empty directory")
  root.mkdir(parents=True, exist_ok=True)
  fields = ("id", "family", "instruction")
  lines = [f"{field} = {_toml_string(getattr(task, field))}" for field in fields]
  lines += ["", "[modes]"]
  for path, file in sorted(task.files.items()):
    target = root / "files" / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(file.data)
    lines.append(f'{_toml_string(path)} = "{file.mode:03o}"')
  (root / "task.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
  (root / "tests.sh").write_text(task.tests, encoding="utf-8")
  solution = "".join(f"{line}\n" for line in task.solution)
  (root / "solution.sh").write_text(solution, encoding="utf-8")


def _toml_string(text: str) -> str:
  # A JSON string is a TOML basic string except for DEL, which TOML wants escaped.
  return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
