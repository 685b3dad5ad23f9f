"""EnvHub: environment images built from recipes, named by their content, kept by Podman.

    hub = EnvHub("https://example.org/recipes.git")
    make_sandbox(hub.ensure("python"), backend="podman")

An image is `localhost/rome-hub/NAME:DIGEST`; the digest covers the recipe and its bases (see
`rome.envs.recipe`), so one that is there is never built again. When an image was last asked for is
kept in one JSON file for all processes of the user, by which `evict` chooses.

Commands of a recipe run as root in a container without network, under limits, and the result is
committed. Left out: pulling from and pushing to registries.
"""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import pathlib
import re
import secrets
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rome import files
from rome.envs import debian, image, owner
from rome.envs import wheels as wheels_lib
from rome.envs.backends import podman, podman_containers, podman_spec
from rome.envs.backends import podman_images as images
from rome.envs.backends.podman_service import message
from rome.envs.common import ImageError, Limits
from rome.envs.recipe import Recipe, load_recipes
from rome.envs.rocklet import cache_dir

PREFIX = "localhost/rome-hub/"
RECIPES = pathlib.Path(__file__).parent / "recipes"
_GIT_TIMEOUT = 300  # seconds
_COMMAND_TIMEOUT = 1800.0  # seconds of a recipe's commands together
_LOCK_TIMEOUT = 3600.0  # seconds that another build, of commands and packages, may take
_BUILD = Limits(memory_mb=2048, cpus=2.0, pids=512, open_files=1024)


@dataclasses.dataclass(frozen=True)
class HubImage:
  """An image that a recipe of the hub names.

  Attributes:
    name: of the recipe.
    tag: what `make_sandbox` takes once it is built.
    built: it is on this machine.
    size: bytes, layers of its base included; 0 if it is not built.
    used: when it was last asked for, seconds since the epoch; 0.0 for never.
  """

  name: str
  tag: str
  built: bool
  size: int
  used: float


class EnvHub:
  """See the module. Processes and threads may use hubs at the same time.

  Attributes:
    recipes: the recipes by name.
    commit: of the git repository; None for a directory.
  """

  def __init__(self, source: str | os.PathLike[str] | None = None, commit: str | None = None):
    """Reads the recipes.

    Args:
      source: a directory, or the URL of a git repository (anything with "://"), whose top level
        holds a directory for each recipe; None for the recipes that come with rome.
      commit: full id to take from the repository; None for its HEAD of now.

    Raises:
      RecipeError: a recipe is wrong.
      ImageError: the repository cannot be had.
    """
    self.commit: str | None = None
    if source is not None and "://" in str(source):
      path, self.commit = _clone(str(source), commit)
    elif commit is not None:
      raise ValueError(f"commit {commit!r}: {source} is no git URL")
    else:
      path = RECIPES if source is None else pathlib.Path(source)
    self.recipes = load_recipes(path.absolute())

  def tag(self, name: str) -> str:
    """The name of a recipe's image, built or not.

    Raises:
      ImageError: there is no such recipe.
    """
    return f"{PREFIX}{name}:{self._digest(self._recipe(name))}"

  def list(self) -> Sequence[HubImage]:
    """Every recipe and whether its image is here, by name."""
    sizes, used = images.list_images(PREFIX), _read_uses()
    found = []
    for name in sorted(self.recipes):
      tag = self.tag(name)
      last = float(used.get(tag, {}).get("used", 0.0))
      found.append(HubImage(name, tag, tag in sizes, sizes.get(tag, 0), last))
    return found

  def ensure(self, name: str) -> str:
    """Builds the image of a recipe, and those it is based on, unless they are here.

    Returns:
      its tag.

    Raises:
      ImageError: there is no such recipe, or it cannot be built.
    """
    recipe = self._recipe(name)
    tag = self.tag(name)
    if not images.image_exists(tag):
      with _lock(f"build-{tag.removeprefix(PREFIX).replace(':', '-')}"):
        if not images.image_exists(tag):  # another process may have built it meanwhile
          self._build(recipe, tag)
    _note_use(tag, self.tag(recipe.base) if recipe.base in self.recipes else "")
    return tag

  def build(self, name: str) -> str:
    """Builds the image of a recipe anew, though it may be here; bases as `ensure` does."""
    tag = self.tag(name)
    with _lock(f"build-{tag.removeprefix(PREFIX).replace(':', '-')}"):
      self._build(self._recipe(name), tag)
    return self.ensure(name)

  def prepull(self, names: Iterable[str]) -> dict[str, str]:
    """Ensures several, one after the other. Returns their tags by name."""
    return {name: self.ensure(name) for name in names}

  def evict(self, max_bytes: int) -> Sequence[str]:
    """Removes the images of hubs that were not asked for longest, until the rest fits.

    Images that a container uses, and bases of images that stay, stay.

    Args:
      max_bytes: of all hub images together; layers that several share count once.

    Returns:
      the tags that were removed.
    """
    return evict(max_bytes)

  def _recipe(self, name: str) -> Recipe:
    if name not in self.recipes:
      raise ImageError(f"no recipe {name!r}; there are {', '.join(sorted(self.recipes))}")
    return self.recipes[name]

  def _digest(self, recipe: Recipe) -> str:
    if recipe.base == "debian":
      return recipe.digest(debian.digest_base())
    if recipe.base == "rome-base":
      return recipe.digest(image.base_archive()[1])
    return recipe.digest(self._digest(self.recipes[recipe.base]))

  def _build(self, recipe: Recipe, tag: str) -> None:
    if recipe.base == "debian":
      _remove_stale()
      with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="hub-") as scratch:
        (pathlib.Path(scratch) / "owner").write_text(owner.label())
        archive = pathlib.Path(scratch) / "rootfs.tar"
        debian.build_archive(recipe.packages, archive)
        more = recipe.files or recipe.pip or recipe.commands
        staging = f"{tag}-base" if more else tag
        images.import_image(archive, staging)
      if staging == tag:
        return
      _commit(recipe, staging, tag)
      images.untag_image(staging)
    elif recipe.base == "rome-base":
      _commit(recipe, podman.Podman().image(None), tag)
    else:
      _commit(recipe, self.ensure(recipe.base), tag)


def _remove_stale() -> None:
  """Removes the half-made root file systems of processes that were killed."""
  for stale in filter(owner.is_abandoned_dir, cache_dir().glob("hub-*")):
    owner.remove_dir(stale)


def evict(max_bytes: int) -> list[str]:
  """See `EnvHub.evict`; it needs no recipes."""
  with _lock("evict"):
    sizes, uses = images.list_images(PREFIX), _read_uses()
    bases = {tag: str(uses.get(tag, {}).get("base", "")) for tag in sizes}
    own = {tag: size - sizes.get(bases[tag], 0) for tag, size in sizes.items()}
    busy = images.images_in_use()
    removed: list[str] = []
    pending = sorted(sizes, key=lambda tag: float(uses.get(tag, {}).get("used", 0.0)))
    while sum(own.values()) > max_bytes:
      needed = {bases[tag] for tag in own}
      able = [tag for tag in pending if tag in own and tag not in needed and tag not in busy]
      if not able:
        break
      if images.remove_image(able[0]):
        own.pop(able[0])
        removed.append(able[0])
      else:
        busy.add(able[0])  # a container has been made of it meanwhile
    _write_uses(lambda uses: {tag: use for tag, use in uses.items() if tag not in removed})
    return removed


def _commit(recipe: Recipe, base: str, tag: str) -> None:
  """Runs a recipe's commands in a container of its base and keeps the result as `tag`."""
  name = f"rome-build-{secrets.token_hex(6)}"
  wheels = dict(zip(recipe.pip, wheels_lib.fetch(recipe.pip), strict=True)) if recipe.pip else {}
  script = "\n".join(["set -e", *_install(wheels), *recipe.commands])
  spec = podman_spec.build_spec(name, base, _BUILD, ["/bin/sh", "-c", script])
  try:
    podman_containers.create(spec)
    if recipe.files or wheels:
      podman_containers.put_archive(name, _archive(recipe, wheels))
    podman_containers.start(name)
    status = podman_containers.wait(name, _COMMAND_TIMEOUT)
    if status:
      said = podman_containers.last_output(name)[:300] or "no output"
      raise ImageError(f"recipe {recipe.name!r}: its commands end with status {status}: {said}")
    images.commit(name, tag)
  except OSError as error:
    raise ImageError(f"recipe {recipe.name!r}: podman: {message(error)}") from error
  finally:
    podman_containers.remove([name])


def _install(wheels: Mapping[str, pathlib.Path]) -> list[str]:
  """Commands that put wheels into /opt/venv."""
  if not wheels:
    return []
  names = " ".join(f"/{wheels_lib.DIRECTORY}/{wheel.name}" for wheel in wheels.values())
  return [
    "test -d /opt/venv || python3 -m venv /opt/venv",
    f"/opt/venv/bin/pip install --quiet --no-index --no-deps --no-cache-dir {names}",
    f"rm -r /{wheels_lib.DIRECTORY}",
  ]


def _archive(recipe: Recipe, wheels: Mapping[str, pathlib.Path]) -> bytes:
  buffer = io.BytesIO()
  sources = [(recipe.directory / source, target) for source, target in recipe.files]
  sources += [(wheel, f"{wheels_lib.DIRECTORY}/{wheel.name}") for wheel in wheels.values()]
  with tarfile.open(fileobj=buffer, mode="w") as tar:
    for path, target in sources:
      info = tarfile.TarInfo(target.lstrip("/"))
      info.size = path.stat().st_size
      info.mode = 0o755 if path.stat().st_mode & 0o111 else 0o644
      info.mtime = image.EPOCH
      with open(path, "rb") as file:
        tar.addfile(info, file)
  return buffer.getvalue()


def _clone(url: str, commit: str | None) -> tuple[pathlib.Path, str]:
  """Fetches one commit of a repository into the cache, read-only. Returns where, and its id."""
  if commit is None:
    commit = (_git("ls-remote", "--", url, "HEAD").split() or [""])[0]
  if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", commit):
    raise ImageError(f"git repository {url}: {commit!r} is no full commit id, or it has no HEAD")
  target = _hub_dir() / f"git-{commit}"
  with _lock(f"git-{commit}"):
    if not target.is_dir():
      with tempfile.TemporaryDirectory(dir=_hub_dir(), prefix="clone-") as scratch:
        tree = pathlib.Path(scratch) / "tree"
        _git("clone", "--quiet", "--no-checkout", "--", url, str(tree))
        _git("-C", str(tree), "checkout", "--quiet", "--detach", commit)
        shutil.rmtree(tree / ".git")
        for path in tree.rglob("*"):
          if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o555)
        os.replace(tree, target)
  return target, commit


def _git(*args: str) -> str:
  # A repository must not choose helpers that run on this machine, or ask for a password.
  safe = ["-c", "protocol.ext.allow=never", "-c", "core.hooksPath=/dev/null"]
  try:
    done = subprocess.run(
      ["git", *safe, *args],
      capture_output=True,
      text=True,
      stdin=subprocess.DEVNULL,
      timeout=_GIT_TIMEOUT,
      env={**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_LFS_SKIP_SMUDGE": "1"},
    )
  except FileNotFoundError as error:
    raise ImageError("git is not installed: apt-get install git") from error
  except subprocess.TimeoutExpired as error:
    raise ImageError(f"git took longer than {_GIT_TIMEOUT} s") from error
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ["no message"]
    raise ImageError(f"git: {lines[-1][:300]}")
  return done.stdout


def _hub_dir() -> pathlib.Path:
  path = cache_dir() / "hub"
  path.mkdir(exist_ok=True)
  return path


@contextlib.contextmanager
def _lock(name: str) -> Iterator[None]:
  """One at a time among all processes and threads of this user. Raises ImageError after an hour."""
  path = _hub_dir() / f"{name}.lock"
  with open(path, "w") as file:
    end, pause = time.monotonic() + _LOCK_TIMEOUT, 0.001
    while True:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError as error:
        if time.monotonic() > end:
          raise ImageError(
            f"another process has held {path} for {_LOCK_TIMEOUT:g} s: end it, or wait for it"
          ) from error
      time.sleep(pause)
      pause = min(0.5, 2 * pause)
    yield


def _read_uses() -> dict[str, dict[str, Any]]:
  try:
    return dict(json.loads((_hub_dir() / "used.json").read_text()))
  except (OSError, ValueError):  # only the order of eviction is lost
    return {}


def _note_use(tag: str, base: str) -> None:
  _write_uses(lambda uses: {**uses, tag: {"used": time.time(), "base": base}})


def _write_uses(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
  with _lock("used"):
    files.write_atomic(_hub_dir() / "used.json", json.dumps(change(_read_uses()), indent=1))
