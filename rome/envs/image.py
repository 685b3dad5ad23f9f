"""The base image: busybox and bash from Debian packages, some 4 MB, no registry.

Built once into the cache as a root file system (which bubblewrap uses as it lies) and as a tar
archive (which Podman imports). The directory is named by a hash of the recipe, the image's tag by a
hash of the archive, whose times and owners are fixed. Two processes that build at once are kept
apart by a lock, and a half-made image never gets the final name.

Rocklet is not in the image: it is bind-mounted, as into every other image.
"""

import fcntl
import hashlib
import os
import pathlib
import platform
import shutil
import struct
import subprocess
import tarfile
import tempfile

from rome.envs.common import ImageError
from rome.envs.rocklet import cache_dir

NAME = "localhost/rome-base"
EPOCH = 1577836800  # 2020-01-01, the time of every file that an agent finds

_PACKAGES = ("busybox-static", "bash-static")
_FILES = {
  "etc/passwd": "root:x:0:0:root:/root:/bin/bash\nagent:x:1000:1000:agent:/work:/bin/bash\n",
  "etc/group": "root:x:0:\nagent:x:1000:\n",
  "etc/hosts": "127.0.0.1 localhost rome\n",
  "etc/hostname": "rome\n",
  "etc/resolv.conf": "",
  "run/rocklet": "",  # bind mounts need something to cover
}
_DIRS = ("bin dev etc proc root run run/rome sbin sys tmp usr usr/bin usr/sbin var work").split()
_APT_TIMEOUT = 300


def base_rootfs() -> pathlib.Path:
  """Returns the root file system of the base image, built at the first use.

  Beside it lies `<name>.tar`, the same as an archive.

  Raises:
    ImageError: the packages cannot be had.
  """
  recipe = repr((_PACKAGES, sorted(_FILES.items()), _DIRS, EPOCH, platform.machine(), 4))
  root = cache_dir() / f"base-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
  with open(cache_dir() / "base.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not root.is_dir():
      with tempfile.TemporaryDirectory(dir=root.parent, prefix="building-") as scratch:
        made = pathlib.Path(scratch) / "rootfs"
        _populate(made, *_find_binaries(pathlib.Path(scratch)))
        _archive(made, pathlib.Path(scratch) / "rootfs.tar")
        os.replace(pathlib.Path(scratch) / "rootfs.tar", f"{root}.tar")
        os.replace(made, root)
  return root


def base_archive() -> tuple[pathlib.Path, str]:
  """Returns the archive of the base image and its tag, `localhost/rome-base:HASH`."""
  path = pathlib.Path(f"{base_rootfs()}.tar")
  return path, f"{NAME}:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _find_binaries(scratch: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Returns static busybox and bash: Debian's packages, or else what this host has."""
  reason = "this host has no apt-get"
  if shutil.which("apt-get") and shutil.which("dpkg"):
    reason = fetch(scratch, _PACKAGES)
    if not reason:
      return scratch / "x/bin/busybox", scratch / "x/bin/bash-static"
  found = [shutil.which("busybox"), shutil.which("bash-static") or shutil.which("bash")]
  if all(path and _is_static(path) for path in found):
    return pathlib.Path(str(found[0])), pathlib.Path(str(found[1]))
  raise ImageError(
    f"the base image needs static busybox and bash: {reason}; "
    "install them (apt-get install busybox-static bash-static) or name an image that holds bash"
  )


def fetch(scratch: pathlib.Path, packages: tuple[str, ...]) -> str:
  """Downloads and unpacks Debian packages into scratch/x. Returns why it failed, '' if it did not.

  Neither step needs root. Where the package lists are missing they are fetched into scratch.
  """
  own_lists = [f"-oDir::State={scratch}/state", f"-oDir::Cache={scratch}/cache"]
  (scratch / "state/lists/partial").mkdir(parents=True)
  (scratch / "cache/archives/partial").mkdir(parents=True)
  sandbox_off = "-oAPT::Sandbox::User="  # or _apt cannot write into a private directory
  plain = ["apt-get", "-q", sandbox_off]
  error = _apt([*plain, "download", *packages], scratch)
  if error:
    error = _apt([*plain, *own_lists, "update"], scratch)
    error = error or _apt([*plain, *own_lists, "download", *packages], scratch)
  for package in sorted(scratch.glob("*.deb")):
    error = error or _apt(["dpkg", "-x", str(package), str(scratch / "x")], scratch)
  return error


def _apt(command: list[str], cwd: pathlib.Path) -> str:
  try:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=_APT_TIMEOUT)
  except subprocess.TimeoutExpired:
    return f"{command[0]} took longer than {_APT_TIMEOUT} s"
  if not done.returncode:
    return ""
  lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or ["failed"]
  return f"{command[0]}: {lines[0]}"


def _populate(root: pathlib.Path, busybox: pathlib.Path, bash: pathlib.Path) -> None:
  for name in _DIRS:
    (root / name).mkdir(parents=True)
  for name, text in _FILES.items():
    (root / name).write_text(text)
  shutil.copyfile(busybox, root / "bin/busybox")
  shutil.copyfile(bash, root / "bin/bash")
  for name in ("busybox", "bash"):
    (root / "bin" / name).chmod(0o755)
  (root / "tmp").chmod(0o1777)
  (root / "run/rome").chmod(0o700)
  applets = subprocess.run(
    [str(root / "bin/busybox"), "--list"], capture_output=True, text=True, check=True, timeout=30
  )
  for applet in sorted(applets.stdout.split()):
    if applet not in ("busybox", "bash"):
      (root / "bin" / applet).symlink_to("busybox")
  (root / "usr/bin/env").symlink_to("/bin/busybox")
  (root / "etc/mtab").symlink_to("/proc/mounts")
  for path in [*root.rglob("*"), root]:
    os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)


def _archive(root: pathlib.Path, to: pathlib.Path) -> None:
  def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = EPOCH
    return info

  with tarfile.open(to, "w", format=tarfile.GNU_FORMAT) as tar:
    for path in [root, *sorted(root.rglob("*"))]:
      tar.add(path, f"./{path.relative_to(root)}", recursive=False, filter=plain)


def _is_static(path: str) -> bool:
  """Whether an ELF file names no interpreter (PT_INTERP) and so runs without libraries."""
  data = pathlib.Path(path).read_bytes()
  if data[:6] != b"\x7fELF\x02\x01":
    return False
  offset = struct.unpack_from("<Q", data, 32)[0]
  size, count = struct.unpack_from("<HH", data, 54)
  kinds = (struct.unpack_from("<I", data, offset + i * size)[0] for i in range(count))
  return 3 not in kinds
