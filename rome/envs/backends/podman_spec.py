"""What Podman is told of a container: SpecGenerators of libpod, as of Podman 4.3.

podman-py's `containers.create` has no words for an empty environment, ignored image volumes or id
mappings, so containers are made by `POST /containers/create` with one of these.
"""

import hashlib
import os
from collections.abc import Iterable
from typing import Any

from rome.envs import owner
from rome.envs.backends import CAPABILITIES, CHILD_CAPABILITIES
from rome.envs.common import Limits

OWNER, RUN = "io.rome.owner", "io.rome.run"
# Host ids that stand for the sandbox's belong to nobody. Each sandbox has 65,536 of its own, so
# that none can use up what the kernel counts by user for the others: keys, inotify watches, pipes.
_FIRST_IDS, _RANGES = 1 << 30, 1 << 15
_SPARE_PIDS = 32  # room in the container for rocklet and its shells beside the agent's processes


def container_spec(
  name: str,
  image: str,
  limits: Limits,
  *,
  entrypoint: Iterable[str],
  command: Iterable[str] = (),
  user: str = "0:0",
  mounts: Iterable[dict[str, Any]] = (),
) -> dict[str, Any]:
  """Everything Podman is told of a sandbox's container: libpod's SpecGenerator, as of 4.3.

  Args:
    name: of the container, also its label `io.rome.run`.
    image: name or id.
    limits: upper bounds.
    entrypoint, command: what runs.
    user: UID:GID inside.
    mounts: further bind mounts.
  """
  memory = limits.memory_mb << 20
  return {
    "name": name,
    "image": image,
    "image_pull_policy": "never",
    "image_volume_mode": "ignore",
    "entrypoint": list(entrypoint),
    "command": list(command),
    "user": user,
    "work_dir": "/",
    "hostname": "rome",
    "labels": {OWNER: owner.label(), RUN: name},
    "unsetenvall": True,
    "httpproxy": False,
    "env": {
      "LC_ALL": "C",
      "TZ": "UTC",
      "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    },
    "remove": True,
    "volatile": True,  # no fsync of a root layer that nobody keeps
    "stop_timeout": 0,
    "systemd": "false",
    "sdnotifyMode": "ignore",
    "log_configuration": {"driver": "none"},
    "healthconfig": {"Test": ["NONE"]},
    "netns": {"nsmode": "none"},
    "ipcns": {"nsmode": "private"},
    "use_image_hosts": True,  # what --no-hosts sets
    "read_only_filesystem": True,
    "cap_drop": ["all"],
    "cap_add": list(CAPABILITIES),
    "no_new_privileges": True,
    # Podman's own defaults for both ulimits may exceed the host's hard limits, so both are set.
    "r_limits": [
      {"type": "nofile", "soft": limits.open_files, "hard": limits.open_files},
      {"type": "nproc", "soft": 4096, "hard": 4096},
    ],
    "resource_limits": {
      "memory": {"limit": memory, "swap": memory},
      "pids": {"limit": limits.pids + _SPARE_PIDS},
      "cpu": {"period": 100_000, "quota": max(1000, int(limits.cpus * 100_000))},
    },
    "shm_size": limits.disk_mb << 20,
    "mounts": list(mounts),
    **_user_namespace(name),
  }


def first_id(name: str) -> int:
  """The first of the 65,536 host ids that a container's users have, where Podman runs as root.

  It follows from the name; two of a thousand sandboxes may have the same, which only means that
  they share those counts.
  """
  number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % _RANGES
  return _FIRST_IDS + 65536 * number


def _user_namespace(name: str) -> dict[str, Any]:
  """Under which the container's users are nobody's here; rootless Podman has one of its own."""
  if os.geteuid():
    return {}
  ids = [{"container_id": 0, "host_id": first_id(name), "size": 65536}]
  return {
    "userns": {"nsmode": "private"},
    "idmappings": {
      "HostUIDMapping": False,
      "HostGIDMapping": False,
      "UIDMap": ids,
      "GIDMap": ids,
    },
  }


def owned_by_caller(spec: dict[str, Any]) -> dict[str, Any]:
  """The same container without a user namespace: its root is the caller, whose the files are then
  that it writes into a mounted directory. Rocklet's children have no capability there.
  """
  return {name: spec[name] for name in spec if name not in ("userns", "idmappings")}


def writable(spec: dict[str, Any]) -> dict[str, Any]:
  """The same container with a root layer that is written to, without a bound, and then committed.

  It has no user namespace: Podman 4 commits the owners of files as they are outside.
  """
  ours = {"remove": False, "volatile": False, "read_only_filesystem": False}
  return {name: spec[name] for name in spec if name not in ("userns", "idmappings")} | ours


def build_spec(name: str, image: str, limits: Limits, command: Iterable[str]) -> dict[str, Any]:
  """As `container_spec`, for a command that changes the image; its output is kept, too.

  It has the capabilities of a package's installation, not those that rocklet needs.
  """
  spec = writable(container_spec(name, image, limits, entrypoint=command))
  tmpfs = ["rw", "exec", "nosuid", "nodev", "size=1g", "mode=1777"]
  return {
    **spec,
    "cap_add": [*CHILD_CAPABILITIES],
    "mounts": [mount("tmpfs", "tmpfs", "/tmp", *tmpfs)],
    "log_configuration": {"driver": "k8s-file", "size": 1 << 20},
  }


def mount(kind: str, source: object, destination: str, *options: str) -> dict[str, Any]:
  return {
    "type": kind,
    "source": str(source),
    "destination": destination,
    "options": list(options),
  }
