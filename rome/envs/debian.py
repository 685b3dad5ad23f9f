"""Root file systems of Debian packages, by debootstrap from the mirrors that this host uses.

Only as reproducible as the mirror: the same package versions give the same files. Lists, caches and
logs are left out, and what the installation wrote gets a fixed time; files of packages keep theirs,
on which Python's compiled modules depend. Documentation and translations are left out for size.

debootstrap needs root. It runs in a mount and a pid namespace of its own, so that nothing that it
mounts or starts outlives it. Where it is not installed, its package is unpacked into the cache.
Left out: other releases than the host's, and components other than main.
"""

import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile
import time

from rome.envs import image
from rome.envs.common import ImageError
from rome.envs.rocklet import cache_dir

TIMEOUT = 1800  # seconds
_KEYRINGS = ("debian-archive-keyring.gpg", "ubuntu-archive-keyring.gpg")
_OMIT = (
  "usr/share/doc/* usr/share/man/* usr/share/info/* usr/share/locale/* var/lib/apt/lists/* "
  "var/cache/apt/* var/cache/debconf/*-old var/cache/ldconfig/* var/lib/dpkg/*-old var/log/* "
  "etc/apt/sources.list tmp/* run/* debootstrap"
).split()
_FILES = {
  "etc/hosts": "127.0.0.1 localhost rome\n",
  "etc/hostname": "rome\n",
  "etc/resolv.conf": "",
  "etc/machine-id": "",
  "run/rocklet": "",
}


def digest_base() -> str:
  """What a Debian image depends on beside its recipe: release, architecture and this module."""
  return f"debian-{_release()}-{platform.machine()}-1"


def build_archive(packages: tuple[str, ...], archive: pathlib.Path) -> None:
  """Writes a root file system as a tar archive.

  Args:
    packages: beside those of debootstrap's smallest variant.
    archive: the file to write.

  Raises:
    ImageError: not root, no mirror, or debootstrap failed; the message says why.
  """
  if os.geteuid():
    raise ImageError("an image of Debian packages needs root: build it as root (sudo -E rome ...)")
  with tempfile.TemporaryDirectory(dir=archive.parent, prefix="debian-") as scratch:
    root = pathlib.Path(scratch) / "root"
    began = time.time()
    _debootstrap(pathlib.Path(scratch), root, packages)
    _settle(root, began)
    command = ["tar", "--sort=name", "--numeric-owner", "--format=gnu", "--one-file-system"]
    excluded = [f"--exclude=./{name}/*" for name in ("dev", "proc", "sys")]
    _run([*command, *excluded, "-cf", str(archive), "-C", str(root), "."], {})


def _release() -> str:
  info = platform.freedesktop_os_release()
  return info.get("VERSION_CODENAME", "unknown")


def _mirror(release: str) -> str:
  """The first address from which this host takes its own release's main packages."""
  form = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
  command = ["apt-get", "indextargets", "--format", form, "Created-By: Packages"]
  for line in _run(command, {}).splitlines():
    if line.split()[1:] == [release, "main"]:
      return line.split()[0]
  raise ImageError(f"no mirror of {release} main in this host's apt sources")


def _debootstrap(scratch: pathlib.Path, root: pathlib.Path, packages: tuple[str, ...]) -> None:
  missing = [name for name in ("apt-get", "setpriv", "unshare", "tar") if not shutil.which(name)]
  if missing:
    raise ImageError(f"an image of Debian packages needs {', '.join(missing)} on the host")
  release = _release()
  program, environment = shutil.which("debootstrap"), {}
  if not program:
    error = image.fetch(scratch, ("debootstrap",))
    if error:
      raise ImageError(f"debootstrap is not installed ({error}): apt-get install debootstrap")
    program = str(scratch / "x/usr/sbin/debootstrap")
    environment = {"DEBOOTSTRAP_DIR": str(scratch / "x/usr/share/debootstrap")}
  cache = cache_dir() / "debs"
  cache.mkdir(exist_ok=True)
  # It ends with this process, and with it whatever runs in its pid namespace.
  command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork"]
  command += ["--kill-child", program, "--variant=minbase"]
  for keyring in _KEYRINGS:
    if os.path.exists(f"/usr/share/keyrings/{keyring}"):
      command.append(f"--keyring=/usr/share/keyrings/{keyring}")
      break
  command += [f"--cache-dir={cache}", f"--include={','.join(['bash', *packages])}"]
  _run([*command, release, str(root), _mirror(release)], environment)


def _settle(root: pathlib.Path, began: float) -> None:
  """Takes out what differs between builds and adds the agent and what sandboxes expect."""
  for pattern in _OMIT:
    for path in root.glob(pattern):
      if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
      else:
        path.unlink()
  for name, text in _FILES.items():
    path = root / name
    path.unlink(missing_ok=True)
    path.write_text(text)
  for name, line in (
    ("etc/passwd", "agent:x:1000:1000:agent:/work:/bin/bash\n"),
    ("etc/group", "agent:x:1000:\n"),
    ("etc/shadow", "agent:*:18262:0:99999:7:::\n"),
  ):
    with open(root / name, "a") as file:
      file.write(line)
  shadow = root / "etc/shadow"  # says on which day every password was set
  shadow.write_text(re.sub(r"(?m)^([^:]*:[^:]*):\d+", r"\1:18262", shadow.read_text()))
  for name in ("work", "run/rome"):
    (root / name).mkdir()
  for path in [*root.rglob("*"), root]:
    if path.lstat().st_mtime >= began:
      os.utime(path, (image.EPOCH, image.EPOCH), follow_symlinks=False)


def _run(command: list[str], environment: dict[str, str]) -> str:
  try:
    done = subprocess.run(
      command,
      capture_output=True,
      text=True,
      errors="replace",
      stdin=subprocess.DEVNULL,
      timeout=TIMEOUT,
      env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **environment},
    )
  except FileNotFoundError as error:
    raise ImageError(f"{command[0]} is not installed") from error
  except subprocess.TimeoutExpired as error:
    raise ImageError(f"{command[0]} took longer than {TIMEOUT} s") from error
  if done.returncode:
    lines = (done.stderr + done.stdout).strip().splitlines() or ["no message"]
    telling = [line for line in lines if line.startswith("E:")] or lines[-1:]
    raise ImageError(f"building the Debian image: {telling[-1][:300]}")
  return done.stdout
