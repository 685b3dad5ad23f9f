"""Recipes of environment images: a directory with `recipe.toml`, checked before anything is built.

    name = "python"                   # that of the directory
    base = "debian"                   # or "rome-base", or the name of another recipe
    packages = ["python3", "git"]     # Debian packages; only with base "debian"
    pip = ["httpx==0.28.1"]           # pinned, with all that they need; they go to /opt/venv
                                      # (packages python3 and python3-venv)
    commands = ["useradd tester"]     # run by sh as root, without network
    [files]                           # copied before the commands run, owned by root
    "settings.ini" = "/etc/settings.ini"

The digest of a recipe covers all of this, the files' content and the digest of its base, so that
the same recipe has the same name everywhere. Left out: Containerfiles, whose builds podman-py
cannot keep within ulimits and off the network with Podman 4.3.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import tomllib

from rome.envs.common import ImageError

ROOTS = ("rome-base", "debian")  # bases that are no recipes
_NAME = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_PIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!]+")
_KINDS = {
  "name": str, "base": str, "packages": list, "pip": list, "commands": list, "files": dict
}  # fmt: skip


class RecipeError(ImageError):
  """A recipe is missing or wrong; the message names the file and the key."""


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What an image is made of.

  Attributes:
    name: of the recipe and of its directory.
    base: one of ROOTS or the name of another recipe.
    directory: where the files lie.
    packages: Debian packages.
    pip: Python packages, "name==version".
    commands: shell commands.
    files: (path in the directory, absolute path in the image), sorted.
  """

  name: str
  base: str
  directory: pathlib.Path
  packages: tuple[str, ...] = ()
  pip: tuple[str, ...] = ()
  commands: tuple[str, ...] = ()
  files: tuple[tuple[str, str], ...] = ()

  def digest(self, base: str) -> str:
    """Content address, 16 hexadecimal digits.

    Args:
      base: that of the base.
    """
    files = [
      (target, (self.directory / source).stat().st_mode & 0o111 != 0, self._content(source))
      for source, target in self.files
    ]
    whole = [base, sorted(self.packages), self.commands, files]
    if self.pip:
      whole.append(sorted(self.pip))
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]

  def _content(self, source: str) -> str:
    return hashlib.sha256((self.directory / source).read_bytes()).hexdigest()


def load_recipe(directory: pathlib.Path) -> Recipe:
  """Reads and checks a recipe.

  Raises:
    RecipeError: it is not there, or something in it is wrong or unknown.
  """
  path = directory / "recipe.toml"
  try:
    table = tomllib.loads(path.read_text())
  except OSError as error:
    raise RecipeError(f"there is no recipe {path}") from error
  except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
    raise RecipeError(f"{path}: {error}") from error
  for key, value in table.items():
    if key not in _KINDS:
      raise RecipeError(f"{path}: unknown key {key!r}; known are {', '.join(_KINDS)}")
    if not isinstance(value, _KINDS[key]):
      raise RecipeError(f"{path}: {key} must be a {_KINDS[key].__name__}, not {value!r}")
  name, base = table.get("name"), table.get("base")
  if name != directory.name or not _NAME.fullmatch(directory.name):
    raise RecipeError(f"{path}: name is {name!r}, but must be that of its directory, in a-z0-9._-")
  if not base or not _NAME.fullmatch(base) or base == name:
    raise RecipeError(f"{path}: base must be one of {', '.join(ROOTS)} or another recipe")
  _check_words(path, table)
  files = tuple(sorted(table.get("files", {}).items()))
  for source, target in files:
    _check_file(path, directory, source, target)
  return Recipe(
    name,
    base,
    directory,
    tuple(table.get("packages", ())),
    tuple(table.get("pip", ())),
    tuple(table.get("commands", ())),
    files,
  )


def _check_words(path: pathlib.Path, table: dict[str, list[str]]) -> None:
  packages, commands = table.get("packages", []), table.get("commands", [])
  for package in packages:
    if not isinstance(package, str) or not _PACKAGE.fullmatch(package):
      raise RecipeError(f"{path}: {package!r} in packages is no name of a Debian package")
  if packages and table["base"] != "debian":
    raise RecipeError(f"{path}: packages need base 'debian', as nothing is installed by network")
  for pin in table.get("pip", []):
    if not isinstance(pin, str) or not _PIN.fullmatch(pin):
      raise RecipeError(f"{path}: {pin!r} in pip must be pinned, name==version")
  for command in commands:
    if not isinstance(command, str) or not command.strip() or "\0" in command:
      raise RecipeError(f"{path}: {command!r} in commands is no shell command")


def _check_file(path: pathlib.Path, directory: pathlib.Path, source: str, target: object) -> None:
  parts = pathlib.PurePosixPath(source).parts
  if not parts or ".." in parts or source.startswith("/"):
    raise RecipeError(f"{path}: file {source!r} must be a path inside the recipe's directory")
  chain = [directory.joinpath(*parts[:i]) for i in range(1, len(parts) + 1)]
  if any(link.is_symlink() for link in chain) or not chain[-1].is_file():
    raise RecipeError(f"{path}: file {source!r} is not there or no regular file")
  if not isinstance(target, str) or not target.startswith("/") or ".." in target.split("/"):
    raise RecipeError(f"{path}: file {source!r} must go to an absolute path, not {target!r}")


def load_recipes(source: pathlib.Path) -> dict[str, Recipe]:
  """Reads every recipe below a directory, by name.

  Raises:
    RecipeError: one of them is wrong, or a base is missing or leads in a circle.
  """
  if not source.is_dir():
    raise RecipeError(f"there is no directory {source} with recipes")
  found = [load_recipe(path.parent) for path in sorted(source.glob("*/recipe.toml"))]
  recipes = {recipe.name: recipe for recipe in found}
  for recipe in found:
    seen = [recipe.name]
    while recipe.base not in ROOTS:
      if recipe.base not in recipes:
        raise RecipeError(f"recipe {recipe.name!r} in {source}: no recipe {recipe.base!r} for base")
      recipe = recipes[recipe.base]
      if recipe.name in seen:
        raise RecipeError(f"recipes in {source}: {' -> '.join([*seen, recipe.name])} is a circle")
      seen.append(recipe.name)
  return recipes
