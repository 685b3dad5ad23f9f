"""Python packages for images: wheels fetched by this host's pip, as builds have no network.

Every package is pinned and nothing is resolved, so that a recipe's digest says what is in its
image. Wheels come from the registry that this host's pip is set up for and stay in the cache.
"""

import pathlib
import platform
import subprocess
import sys
import tempfile
import zipfile

from rome.envs.common import ImageError
from rome.envs.rocklet import cache_dir

TIMEOUT = 900  # seconds
DIRECTORY = "opt/wheels"  # in the image, while it is built
# Python of a release of Debian or Ubuntu.
_PYTHONS = {"bookworm": "3.11", "trixie": "3.13", "jammy": "3.10", "noble": "3.12"}
_GLIBC = {"bookworm": 36, "trixie": 41, "jammy": 35, "noble": 39}  # 2.x
_OLDEST = 17  # of the manylinux tags that are asked for


def fetch(packages: tuple[str, ...]) -> list[pathlib.Path]:
  """The wheels of pinned packages, in their order, for the Python of this host's release.

  Raises:
    ImageError: the registry does not have one, or the release's Python is not known.
  """
  release = platform.freedesktop_os_release().get("VERSION_CODENAME", "unknown")
  if release not in _PYTHONS:
    raise ImageError(
      f"recipes with pip need a host of {', '.join(_PYTHONS)}, whose Python is known; this is "
      f"{release}: name an image of your own"
    )
  target = cache_dir() / "wheels" / release
  target.mkdir(parents=True, exist_ok=True)
  missing = [package for package in packages if not _find(target, package)]
  if missing:
    # Aside, then renamed: neither a killed pip nor another build leaves half a wheel there.
    with tempfile.TemporaryDirectory(dir=target) as aside:
      _download(missing, pathlib.Path(aside), release)
      for path in pathlib.Path(aside).glob("*.whl"):
        path.replace(target / path.name)
  found = [_find(target, package) for package in packages]
  for package, wheel in zip(packages, found, strict=True):
    if wheel is None:
      raise ImageError(f"pip fetched no wheel for {package}")
  return [wheel for wheel in found if wheel]


def _find(directory: pathlib.Path, package: str) -> pathlib.Path | None:
  """The wheel of a package, as pip names it; one that was cut off is none."""
  name, _, version = package.partition("==")
  stem = f"{_plain(name)}-{version}"
  for path in sorted(directory.glob("*.whl")):
    parts = path.name.split("-")
    if f"{_plain(parts[0])}-{parts[1]}" == stem and zipfile.is_zipfile(path):
      return path
  return None


def _plain(name: str) -> str:
  return name.lower().replace("-", "_").replace(".", "_")


def _download(packages: list[str], target: pathlib.Path, release: str) -> None:
  machine = platform.machine()
  command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
  command += ["--disable-pip-version-check", f"--dest={target}", "--implementation=cp"]
  command += [f"--python-version={_PYTHONS[release]}"]
  for minor in range(_GLIBC[release], _OLDEST - 1, -1):
    command.append(f"--platform=manylinux_2_{minor}_{machine}")
  command.append(f"--platform=manylinux2014_{machine}")
  try:
    done = subprocess.run(
      [*command, *packages],
      capture_output=True,
      text=True,
      stdin=subprocess.DEVNULL,
      timeout=TIMEOUT,
    )
  except subprocess.TimeoutExpired as error:
    raise ImageError(f"pip took longer than {TIMEOUT} s to fetch wheels") from error
  if done.returncode:
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip failed"]
    raise ImageError(f"fetching wheels: {errors[-1][:300]}")
