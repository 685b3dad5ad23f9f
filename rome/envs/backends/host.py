"""Bubblewrap around a directory of the user's: what `rome agent` works in.

The directory is writable under its own path, but for what git on the host obeys: `_RUN_BY_GIT`, or
a `.git` that is a file (of a worktree or a submodule). What git would obey if it were new (a
repository within, `.git/commondir`) cannot be kept out by mounts without keeping the agent from
git; `rome agent` tells of it (`rome.agent.cli.planted`). Of the machine the
sandbox sees programs and libraries (`_SYSTEM`), read-only. Homes, /tmp and /run are empty and die
with the sandbox; secrets of the machine (`_SECRETS`) cannot be read. The agent is the
user who calls, so files belong to whom they should. The rest is as in `bubblewrap.py`: namespaces,
rocklet as pid 1, its system call filter, no network but through a policy.

Left out, as the directory is the user's and outlives the sandbox: a writable root, resets,
snapshots, a second user, a bound of memory (bounding the address space of each process stops
compilers and runtimes that reserve much and use little).
"""

import os
import pathlib

from rome.envs.common import HostDirectory, Limits, SandboxError

_SYSTEM = "usr bin sbin lib lib32 lib64 libx32 opt etc nix".split()
_SECRETS = ("shadow shadow- gshadow gshadow- sudoers sudoers.d ssh ssl/private").split()
_KEEPS_OUT = ("/usr", "/etc", "/proc", "/sys", "/dev", "/run", "/boot", "/var/run")
# For rocklet: to make devices read-only, to give capabilities up, for the policy's DNS server.
CAPABILITIES = ("SYS_ADMIN", "SETPCAP", "NET_BIND_SERVICE")
# Behind all other mounts: memory of the machine that nothing bounds is not to be written to.
SEALED = (
  *("--size", str(1 << 30), "--perms", "1777", "--tmpfs", "/dev/shm"),
  *("--remount-ro", "/dev", "--remount-ro", "/run", "--remount-ro", "/"),
)
_RUN_BY_GIT = (".git/config", ".git/hooks")
_OF_THE_USER = (".rome", ".ssh", ".gnupg")  # in the home: what programs of the user obey
_PATH = "/usr/local/bin:/usr/bin:/bin"


def check(directory: HostDirectory) -> pathlib.Path:
  """The directory's real path.

  Raises:
    SandboxError: it is none, or not one to be given to an agent.
  """
  path = pathlib.Path(os.path.realpath(directory.path))
  if not path.is_dir():
    raise SandboxError(f"workdir {directory.path!r} is no directory: name one that exists")
  home = pathlib.Path(os.path.realpath(os.path.expanduser("~")))
  if path == home or path in home.parents or path == pathlib.Path("/tmp"):
    raise SandboxError(
      f"workdir {str(path)!r} holds your home or everybody's files: "
      "change into the directory of one project"
    )
  if any(path.is_relative_to(home / name) for name in _OF_THE_USER):
    raise SandboxError(f"workdir {str(path)!r} holds settings or keys of yours: work on a copy")
  if any(path.is_relative_to(place) for place in _KEEPS_OUT):
    raise SandboxError(f"workdir {str(path)!r} is the system's: work on a copy elsewhere")
  return path


def flags(directory: HostDirectory, limits: Limits, home: pathlib.Path) -> list[str]:
  """bwrap's arguments that make the root.

  Args:
    directory: what to work in.
    limits: `disk_mb` bounds each of /tmp and the home.
    home: the sandbox's own directory on the host.
  """
  path = check(directory)
  found: list[str] = []
  for name in _SYSTEM:
    place = pathlib.Path("/", name)
    if place.is_symlink():
      found += ["--symlink", os.readlink(place), str(place)]
    elif place.is_dir():
      found += ["--ro-bind", str(place), str(place)]
  for name in _SECRETS:
    place = pathlib.Path("/etc", name)
    if place.is_dir():
      found += ["--tmpfs", str(place), "--remount-ro", str(place)]
    elif place.exists():
      found += ["--ro-bind", "/dev/null", str(place)]
  resolver = home / "resolv.conf"  # of the policy, if there is one (network/egress.py)
  resolver.write_text("nameserver 127.0.0.1\n")
  size = ["--size", str(limits.disk_mb << 20)]
  found += ["--perms", "0755", "--tmpfs", "/run", *size, "--perms", "1777", "--tmpfs", "/tmp"]
  found += ["--dir", "/var", "--symlink", "/tmp", "/var/tmp"]
  found += [*size, "--perms", "0700", "--tmpfs", os.path.expanduser("~")]
  found += ["--ro-bind", str(resolver), os.path.realpath("/etc/resolv.conf")]
  for readable in directory.readable:
    found += ["--ro-bind", os.path.realpath(readable), os.path.abspath(readable)]
  for place, writable in places(path):
    found += ["--bind" if writable else "--ro-bind", str(place), str(place)]
  return found


def places(path: pathlib.Path) -> list[tuple[pathlib.Path, bool]]:
  """What to mount of a directory, in order, and whether it may be written to."""
  found = [(path, True)]
  git = path / ".git"
  if git.is_symlink():
    raise SandboxError(f"{git} is a link, in whose place the agent could put another: use a clone")
  if git.is_dir():  # a mount of its own, so that no other can take its name
    found.append((git, True))
    (git / "hooks").mkdir(exist_ok=True)  # which it could make otherwise
    found += [(path / name, False) for name in _RUN_BY_GIT if (path / name).exists()]
  elif git.exists():
    found.append((git, False))
  return found


def variables(directory: HostDirectory) -> dict[str, str]:
  """What programs find in their environment: a home that is empty, and the caller's PATH as far as
  the sandbox has it."""
  seen = [pathlib.Path("/", name) for name in _SYSTEM]
  seen += [check(directory), *(pathlib.Path(os.path.abspath(r)) for r in directory.readable)]
  given = [pathlib.Path(part) for part in os.environ.get("PATH", "").split(":") if part]
  kept = [str(part) for part in given if any(part.is_relative_to(place) for place in seen)]
  return {
    "PATH": ":".join(dict.fromkeys([*kept, *_PATH.split(":")])),
    "HOME": os.path.expanduser("~"),
    "TMPDIR": "/tmp",
    "LC_ALL": "C.UTF-8",
  }


def arguments(directory: HostDirectory, limits: Limits) -> list[str]:
  """rocklet's arguments."""
  return [
    *("keep=1", "seal=1", f"work={check(directory)}", "clean=/dev/shm", f"uid={os.getuid()}"),
    *(f"output={limits.output_bytes}", f"fsize={2 * limits.disk_mb << 20}"),
    *(f"nofile={limits.open_files}", f"nproc={limits.pids}"),
  ]
