"""What an agent is, as typed settings, and where they come from.

    loaded = load(directory, flags={"limits.turns": 20})
    loaded.settings.model, loaded.notes

Precedence, the first counts: flags, environment (`ROME_AGENT_MODEL`, and two underscores for a dot:
`ROME_AGENT_LIMITS__TURNS`), the project's file (`.rome/agent.toml` beside the nearest `.git` or
`.rome` above the directory), the user's (`~/.rome/agent.toml`), defaults. Tables are merged key by
key; an array replaces the one below it.

A directory may come from anybody. So what its file says under `GUARDED` (commands that would run,
permissions, where requests go, a chat template) counts only with the user's consent, which is for
exactly these words (`consent`); without it the keys are left out and a note says so.

A consent is for the words, and not for the files that they name: what a hook or a server runs lies
best outside of the project, where the agent cannot change it. A note says where it does not.

Left out: YAML, files that include others, settings that change while an agent runs.
"""

import contextlib
import dataclasses
import datetime
import fnmatch
import functools
import hashlib
import itertools
import json
import os
import pathlib
import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rome.agent.hooks import Hook, check_event, check_matcher
from rome.agent.loop import Limits
from rome.agent.mcp import Server
from rome.agent.model import ModelSettings
from rome.agent.permissions import Rules, parse_rule
from rome.agent.tools.base import Tool
from rome.files import read_regular, write_atomic

FILE = "agent.toml"
MAX_FILE = 1 << 20  # bytes of a file of settings, and of a system prompt
GUARDED = ("hooks", "mcp", "permissions", "endpoint", "api_key_variable", "tokenizer")
_PATHS = ("tokenizer", "system_prompt")
PREFIX = "ROME_AGENT_"
Scalar = bool | int | float | str


class SettingsError(ValueError):
  """A setting is unknown or wrong; the message names where it stands, the key and the mend."""


@dataclasses.dataclass(frozen=True)
class ToolSettings:
  """Which tools there are.

  Attributes:
    only: names or patterns of names; () for all.
    off: the same, taken away.
  """

  only: tuple[str, ...] = ()
  off: tuple[str, ...] = ()

  def wants(self, name: str) -> bool:
    """Whether a tool of this name is there."""

    def named(patterns: Iterable[str]) -> bool:
      return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return (not self.only or named(self.only)) and not named(self.off)

  def choose(self, tools: Iterable[Tool]) -> list[Tool]:
    """Those that there are."""
    return [tool for tool in tools if self.wants(tool.name)]


@dataclasses.dataclass(frozen=True)
class AgentSettings:
  """One agent.

  Attributes:
    model: as the endpoint names it.
    endpoint: base URL of an OpenAI-compatible API.
    api_key_variable: environment variable with the key.
    tokenizer: directory or GGUF file with the model's tokenizer and chat template, by which tokens
      are counted as training counts them; "" for that of a checkpoint, and an estimate where an
      endpoint answers. In a file of settings it is relative to that file.
    max_tokens: of a reply.
    context_tokens: of a request and its reply together.
    temperature, top_p: None for the endpoint's own.
    system_prompt: file with the system prompt, "" for the built-in one. In a file of settings it is
      relative to that file; a project's lies in the project.
    memory: whether ROME.md files are read (`rome.agent.memory`).
    limits: when an episode ends.
    permissions, tools: see there.
    skills: by name, a table of its numbers; `on = false` takes one away.
    hooks: by event.
    mcp: servers by name.
  """

  model: str = ""
  endpoint: str = ""
  api_key_variable: str = "OPENAI_API_KEY"
  tokenizer: str = ""
  max_tokens: int = 4096
  context_tokens: int = 32768
  temperature: float | None = None
  top_p: float | None = None
  system_prompt: str = ""
  memory: bool = True
  limits: Limits = Limits()
  permissions: Rules = Rules()
  tools: ToolSettings = ToolSettings()
  skills: Mapping[str, Mapping[str, Scalar]] = dataclasses.field(default_factory=dict)
  hooks: Mapping[str, tuple[Hook, ...]] = dataclasses.field(default_factory=dict)
  mcp: Mapping[str, Server] = dataclasses.field(default_factory=dict)

  def request(self) -> ModelSettings:
    """What every request says beside its messages."""
    return ModelSettings(self.model, self.max_tokens, self.temperature, self.top_p)

  def system(self, built_in: str) -> str:
    """The system prompt.

    Raises:
      SettingsError: its file cannot be read.
    """
    if not self.system_prompt:
      return built_in
    try:
      return read_regular(self.system_prompt, MAX_FILE).decode()
    except (OSError, ValueError) as error:
      raise SettingsError(f"system_prompt: {self.system_prompt} cannot be read ({error})") from None


@dataclasses.dataclass(frozen=True)
class Withheld:
  """What a project's file says and nobody has consented to.

  Attributes:
    file: the file.
    sections: what it says, to be shown.
  """

  file: pathlib.Path
  sections: Mapping[str, Any]

  def digest(self) -> str:
    """Of these words."""
    text = json.dumps(self.sections, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Settings, and what there is to say about them.

  Attributes:
    settings: of all layers.
    root: directory of the project.
    files: those that were read, the user's first.
    notes: lines for the user.
    withheld: what waits for consent, or None.
  """

  settings: AgentSettings
  root: pathlib.Path
  files: tuple[pathlib.Path, ...] = ()
  notes: tuple[str, ...] = ()
  withheld: Withheld | None = None


def user_directory() -> pathlib.Path:
  """Where a user's own settings, memory, agents, workflows and consents are."""
  return pathlib.Path.home() / ".rome"


def project_root(directory: str | os.PathLike[str]) -> pathlib.Path:
  """The nearest directory with .git or .rome, upwards; else the directory itself.

  The home directory is no project for its .rome, which is the user's.
  """
  start = pathlib.Path(directory).resolve()
  home = pathlib.Path.home().resolve()
  for path in (start, *start.parents):
    if (path / ".git").exists() or ((path / ".rome").is_dir() and path != home):
      return path
  return start


def load(
  directory: str | os.PathLike[str],
  flags: Mapping[str, Any] | None = None,
  environment: Mapping[str, str] | None = None,
  trust: bool = False,
) -> Loaded:
  """Reads all layers.

  Args:
    directory: where the agent works.
    flags: by key, with dots for tables; texts are read as TOML values where the key is no text.
    environment: os.environ where None.
    trust: counts a project's file whole, whatever was consented to.
  Raises:
    SettingsError: see there.
  """
  root = project_root(directory)
  user_file, project_file = user_directory() / FILE, root / ".rome" / FILE
  user, project = _file(user_file), {} if _same(user_file, project_file) else _file(project_file)
  withheld = None
  if user:
    _rebase(user, user_file, None)
  if project:
    _rebase(project, project_file, root)
    guarded = Withheld(project_file, {key: project[key] for key in GUARDED if key in project})
    if guarded.sections and not trust and not consented(guarded):
      withheld = guarded
      project = {key: value for key, value in project.items() if key not in GUARDED}
  environment = os.environ if environment is None else environment
  merged: dict[str, Any] = {}
  for layer in (user, project, _variables(environment), _flags(flags or {})):
    merged = _merge(merged, layer)
  settings = _check(merged, "the settings together")
  for name, server in settings.mcp.items():
    if bool(server.command) == bool(server.url):
      raise SettingsError(f"mcp.{name} needs a command or a url, and not both")
  files = tuple(path for path, layer in ((user_file, user), (project_file, project)) if layer)
  return Loaded(settings, root, files, tuple(_notes(settings, root, withheld)), withheld)


def load_file(path: str | os.PathLike[str]) -> AgentSettings:
  """The settings of one file alone, without other layers: what a training run is made by.

  Raises:
    SettingsError: there is no such file, or it is wrong.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    raise SettingsError(f"{path}: there is no such file")
  found = _file(file)
  _rebase(found, file, None)
  return _check(found, str(path))


def _same(one: pathlib.Path, two: pathlib.Path) -> bool:
  return os.path.realpath(one) == os.path.realpath(two)  # Path.resolve fails at links in a circle


def _notes(settings: AgentSettings, root: pathlib.Path, withheld: Withheld | None) -> Iterator[str]:
  if withheld:
    yield (
      f"{withheld.file}: {', '.join(withheld.sections)} are off, as nobody has consented to what "
      "they say; consent once in a terminal, or trust the file by flag"
    )
  commands = [hook.command.split() for hooks in settings.hooks.values() for hook in hooks]
  for word in itertools.chain(*commands, *(server.command for server in settings.mcp.values())):
    path = root / os.path.expanduser(word.strip("'\""))
    if os.path.isfile(path) and path.resolve().is_relative_to(root):
      yield (
        f"a hook or MCP server runs {path}, which the agent can change although it runs outside of "
        "the sandbox; move it out of the project"
      )


def consented(withheld: Withheld) -> bool:
  """Whether the user has said yes to exactly this."""
  return _consents().get(str(withheld.file.resolve())) == withheld.digest()


def consent(withheld: Withheld) -> None:
  """Remembers the user's yes in `~/.rome/consents.json`.

  Raises:
    WriteError: it cannot be written.
  """
  user_directory().mkdir(parents=True, exist_ok=True)
  known = {**_consents(), str(withheld.file.resolve()): withheld.digest()}
  write_atomic(user_directory() / "consents.json", json.dumps(known, indent=2) + "\n")


def _consents() -> dict[str, str]:
  try:
    found = json.loads((user_directory() / "consents.json").read_bytes())
  except (OSError, ValueError):
    return {}  # none, which only asks again
  return found if isinstance(found, dict) else {}


def _file(path: pathlib.Path) -> dict[str, Any]:
  """A checked file, {} where there is none."""
  try:
    found = tomllib.loads(read_regular(path, MAX_FILE).decode())
  except (FileNotFoundError, NotADirectoryError):
    return {}
  except (tomllib.TOMLDecodeError, RecursionError) as error:
    raise SettingsError(f"{path} is no TOML: {error}") from None
  except (OSError, ValueError) as error:
    raise SettingsError(f"{path} cannot be read: {error}") from None
  _check(found, str(path))
  return found


def _rebase(layer: dict[str, Any], file: pathlib.Path, root: pathlib.Path | None) -> None:
  """Makes the file's relative paths absolute; a project's may not leave the project."""
  for key in filter(layer.get, _PATHS):
    try:
      path = pathlib.Path(os.path.realpath(file.parent / os.path.expanduser(layer[key])))
    except (OSError, ValueError) as error:
      raise SettingsError(f"{file}: {key}: it is no path: {error}") from None
    if root and not path.is_relative_to(root):
      raise SettingsError(f"{file}: {key}: {path} is outside of the project; move it there")
    layer[key] = str(path)


def _variables(environment: Mapping[str, str]) -> dict[str, Any]:
  layer: dict[str, Any] = {}
  for name, text in environment.items():
    if name.startswith(PREFIX):
      key = name.removeprefix(PREFIX).lower().replace("__", ".")
      layer = _merge(layer, _set(key, text, name))
  return layer


def _flags(flags: Mapping[str, Any]) -> dict[str, Any]:
  layer: dict[str, Any] = {}
  for key, value in flags.items():
    layer = _merge(layer, _set(key, value, f"the flag {key}"))
  return layer


def _set(key: str, value: Any, where: str) -> dict[str, Any]:
  """A checked layer with one key; a text is read as a TOML value where the key wants no text."""
  *tables, last = key.split(".")
  wrong: SettingsError | None = None
  for meant in _meanings(value):
    layer: dict[str, Any] = {last: meant}
    for table in reversed(tables):
      layer = {table: layer}
    try:
      _check(layer, where)
      return layer
    except SettingsError as error:
      wrong = wrong or error
  assert wrong
  raise wrong


def _meanings(value: Any) -> Iterator[Any]:
  if isinstance(value, str):
    try:
      yield tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
      pass
  yield value


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
  """Tables key by key, all else replaced."""
  merged = dict(low)
  for key, value in high.items():
    below = merged.get(key)
    both = isinstance(below, Mapping) and isinstance(value, Mapping)
    merged[key] = _merge(typing.cast(Mapping, below), value) if both else value
  return merged


def _check(layer: Mapping[str, Any], where: str) -> AgentSettings:
  """The layer as settings.

  Raises:
    SettingsError: the first thing that is wrong.
  """
  import pydantic

  for key, value in _leaves(layer):
    if isinstance(value, datetime.date | datetime.time) or (value != value):
      raise SettingsError(f"{where}: {key}: {value} is no value of a setting; quote a text")
  text = json.dumps(layer)
  try:
    settings = _adapter().validate_json(text, strict=True, extra="forbid")
  except pydantic.ValidationError as error:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
      raise SettingsError(f"{where}: no setting {key}; {_known(first['loc'])}") from None
    raise SettingsError(f"{where}: {key}: {first['msg']}, not {first['input']!r}") from None
  try:
    _check_more(settings)
  except ValueError as error:
    raise SettingsError(f"{where}: {error}") from None
  return settings


@functools.cache
def _adapter() -> Any:
  import pydantic  # takes 0.1 s, which is paid where a layer is read

  return pydantic.TypeAdapter(AgentSettings)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
  """What stands in a layer beneath tables and arrays."""
  if not isinstance(value, Mapping | list | tuple):
    yield key, value
    return
  items = value.items() if isinstance(value, Mapping) else enumerate(value)
  for name, one in items:
    yield from _leaves(one, f"{key}.{name}" if key else str(name))


def _known(loc: tuple[int | str, ...]) -> str:
  """The keys that there are where an unknown one stands."""
  kind: Any = AgentSettings
  for part in loc[:-1]:
    if dataclasses.is_dataclass(kind):
      kind = typing.get_type_hints(kind)[str(part)]
    else:
      kind = [of for of in typing.get_args(kind) if of is not Ellipsis][-1]
  return f"there are: {', '.join(field.name for field in dataclasses.fields(kind))}"


def _check_more(settings: AgentSettings) -> None:
  """What types do not say. Raises ValueError, which names the key."""
  for event, hooks in settings.hooks.items():
    with _naming("hooks"):
      check_event(event)
      for hook in hooks:
        check_matcher(hook.matcher)
  for kind in ("allow", "ask", "deny"):
    with _naming(f"permissions.{kind}"):
      for rule in getattr(settings.permissions, kind):
        parse_rule(rule)
  positive = {
    "max_tokens": settings.max_tokens,
    "context_tokens": settings.context_tokens,
    "limits.turns": settings.limits.turns,
    **{f"mcp.{name}.timeout": server.timeout for name, server in settings.mcp.items()},
    **{f"hooks.{e}.timeout": h.timeout for e, hooks in settings.hooks.items() for h in hooks},
  }
  for key, value in positive.items():
    if value <= 0:
      raise ValueError(f"{key} must be above 0, not {value}")


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{key}: {error}") from None
