"""Sandboxes in Podman containers, rootless or root, through podman-py and a private service.

Commands never go through Podman: rocklet gets a listening socket of the host's, so the client talks
to it directly, and Podman only starts and removes containers. They carry the labels `io.rome.owner`
and `io.rome.run`.

The OCI runtime is found by trial: crun refuses hosts with hybrid cgroups, where runc works.

Containers are made by `POST /containers/create` with a SpecGenerator: podman-py's
`containers.create` has no words for an empty environment, ignored image volumes or the sizes of
tmpfs. What a service that was killed while it started a container leaves behind (a monitor and a
container that wait for ever, which Podman no longer knows) is looked for in /proc.
"""

import errno
import functools
import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from rome.envs import image as image_lib
from rome.envs import owner, rocklet
from rome.envs.backends import (
  CAPABILITIES,
  SCRATCH,
  Launched,
  install_hint,
  listen,
  process_bounds,
  rocklet_args,
)
from rome.envs.backends.podman_images import image_exists, import_image, tag_image
from rome.envs.backends.podman_service import PACKAGES, Interrupted, message, service
from rome.envs.backends.podman_service import sweep as sweep_services
from rome.envs.common import BackendUnavailable, ImageError, Limits, SandboxError, SandboxLost

if TYPE_CHECKING:
  import podman

OWNER, RUN = "io.rome.owner", "io.rome.run"
WORKDIR = "/work"
_SPARE_PIDS = 32  # room in the container for rocklet and its shells beside the agent's processes
_TRIES = 3  # of a start, if the service ends meanwhile
_AT_ONCE = 8  # removals


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
  tmpfs = ["rw", "exec", "nosuid", "nodev", f"size={limits.disk_mb}m"]
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
    "mounts": [
      _mount("tmpfs", "tmpfs", WORKDIR, *tmpfs),
      _mount("tmpfs", "tmpfs", "/tmp", *tmpfs, "mode=1777"),
      *mounts,
    ],
  }


def build_spec(name: str, image: str, limits: Limits, command: Iterable[str]) -> dict[str, Any]:
  """As `container_spec`, for a command that changes the image: its root layer is writable, without
  a bound, and stays after its end, as does its output."""
  spec = container_spec(name, image, limits, entrypoint=command)
  tmpfs = ["rw", "exec", "nosuid", "nodev", "size=1g", "mode=1777"]
  return {
    **spec,
    "remove": False,
    "volatile": False,
    "read_only_filesystem": False,
    "mounts": [_mount("tmpfs", "tmpfs", "/tmp", *tmpfs)],
    "log_configuration": {"driver": "k8s-file", "size": 1 << 20},
  }


def put_archive(name: str, data: bytes) -> None:
  """Unpacks a tar archive at the root of a container that `create` made."""

  def action(client: "podman.PodmanClient") -> None:
    parameters = {"path": "/"}
    client.api.put(f"/containers/{name}/archive", params=parameters, data=data).raise_for_status()

  service.call(action)


def last_output(name: str) -> str:
  """The last line that a container of `build_spec` wrote; '' if it wrote none."""
  logs: Any = service.call(lambda client: client.containers.get(name).logs(tail=20))
  text = b"".join(logs).decode(errors="replace")
  return (text.strip().splitlines() or [""])[-1]


def _mount(kind: str, source: object, destination: str, *options: str) -> dict[str, Any]:
  return {
    "type": kind,
    "source": str(source),
    "destination": destination,
    "options": list(options),
  }


class Container:
  """A running container."""

  workdir = WORKDIR

  def __init__(self, name: str, pid: int):
    self.name = name
    self.pid = pid

  def reason(self) -> str:
    state = _state(self.name)
    if state is None:
      return "its container is gone"
    return "out of memory" if state.get("OOMKilled") else f"its container is {state.get('Status')}"

  def stop(self) -> None:
    remove([self.name])


def create(spec: dict[str, Any]) -> tuple[str, list[str]]:
  """Makes a container, not started yet. Returns its id and Podman's warnings.

  Raises:
    podman.errors.APIError: Podman refuses.
    Interrupted: the service ended meanwhile.
  """

  def action(client: "podman.PodmanClient") -> dict[str, Any]:
    kind = {"Content-Type": "application/json"}
    answer = client.api.post("/containers/create", data=json.dumps(spec), headers=kind)
    answer.raise_for_status()
    return dict(answer.json())

  made = service.call(action, repeat=False)
  return str(made["Id"]), list(made.get("Warnings") or [])


def start(name: str) -> None:
  """Starts a container that `create` made; raises as that does."""
  service.call(
    lambda client: client.api.post(f"/containers/{name}/start").raise_for_status(), repeat=False
  )


def wait(name: str, timeout: float) -> int:
  """Waits for a container's end. Returns its exit status.

  Raises:
    SandboxError: it took longer than `timeout` seconds.
  """

  def action(client: "podman.PodmanClient") -> int:
    answer = client.api.post(f"/containers/{name}/wait", timeout=timeout)
    answer.raise_for_status()
    return int(answer.text)

  return service.call(action)


def remove(names: list[str]) -> None:
  """Removes containers at once; those that are gone already do not matter."""

  def one(name: str) -> None:
    parameters = {"force": "true", "timeout": 0, "ignore": "true", "v": "true"}
    # The status does not matter: what is left, or locked by its own clean-up, the sweep finds.
    service.call(lambda client: client.api.delete(f"/containers/{name}", params=parameters))

  def work() -> None:
    while pending:
      try:
        one(pending.pop())
      except (IndexError, SandboxError) as error:  # another thread took it, or nobody can
        errors.append(error)

  pending, errors = list(names), list[Exception]()
  threads = [threading.Thread(target=work) for _ in range(min(_AT_ONCE, len(names)) - 1)]
  for i, thread in enumerate(threads):
    try:
      thread.start()
    except RuntimeError:  # the interpreter is ending: no more threads
      threads = threads[:i]
      break
  work()
  for thread in threads:
    thread.join()
  for error in errors:
    if isinstance(error, SandboxError):
      raise error


def purge(containers: dict[str, str]) -> None:
  """Removes containers whose start was interrupted, and what Podman does not know of them.

  Args:
    containers: ids by name; "" where Podman has not said that it made one.
  """
  for pid, container in _monitors():
    if container in containers.values():
      _kill_tree(pid)
  for container in filter(None, containers.values()):
    _delete(container)
  remove(list(containers))


def _monitors() -> list[tuple[int, str]]:
  """Pids of every running conmon and the ids of their containers."""
  found = []
  for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
      arguments = pathlib.Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
      continue
    if arguments[0].endswith("conmon") and "-c" in arguments:
      found.append((int(pid), arguments[arguments.index("-c") + 1]))
  return found


def _kill_tree(pid: int) -> None:
  """Ends a monitor, first, and what it started: its runtime or its container."""
  try:
    tasks = list(pathlib.Path(f"/proc/{pid}/task").glob("*/children"))
    children = [int(child) for task in tasks for child in task.read_text().split()]
    os.kill(pid, signal.SIGKILL)
  except OSError:
    return
  for child in children:
    _kill_tree(child)


def _delete(container: str) -> None:
  """Ends a container behind Podman's back, down to its cgroups. Nothing happens if it is gone."""
  bases = ["/run", os.environ.get("XDG_RUNTIME_DIR") or "/run"]
  for runtime in filter(shutil.which, ("runc", "crun")):
    if any(os.path.isdir(f"{base}/{runtime}/{container}") for base in bases):
      command = [runtime, "delete", "--force", container]
      if os.geteuid():
        command = ["podman", "unshare", *command]  # its processes have subordinate ids
      subprocess.run(command, capture_output=True, timeout=30)
  for path in pathlib.Path("/sys/fs/cgroup").glob(f"*/libpod_parent/libpod-{container}"):
    for _ in range(100):
      try:
        path.rmdir()
        break
      except OSError as error:
        if error.errno != errno.EBUSY:
          break
        time.sleep(0.02)  # its processes are about to end


def _state(name: str) -> dict[str, Any] | None:
  """The state of a container as `podman inspect` has it; None if it is gone."""

  def action(client: "podman.PodmanClient") -> dict[str, Any] | None:
    answer = client.api.get(f"/containers/{name}/json")
    return dict(answer.json()["State"]) if answer.ok else None

  return service.call(action)


def _hand_over(boot: socket.socket, listener: socket.socket, name: str) -> int:
  """Waits for the rocklet of a new container and gives it its socket. Returns its pid."""
  boot.settimeout(3)
  for _ in range(10):
    try:
      connection, _ = boot.accept()
      break
    except TimeoutError:
      if (_state(name) or {}).get("Status") not in ("created", "initialized", "running"):
        raise ConnectionError("its container ended at once") from None
  else:
    raise TimeoutError("nothing answers in its container")
  with connection:
    socket.send_fds(connection, [b"1"], [listener.fileno()])
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
  return int(struct.unpack("3i", peer)[0])


def _settle_root(pid: int) -> None:
  """Sets time and mode of the root directory, which `ls -la` in the work directory shows as `..`.

  They are those of the overlay's upper directory, made a moment ago; the kernel names it in the
  container's mounts. With other storage drivers they stay as they are.
  """
  try:
    mounts = pathlib.Path(f"/proc/{pid}/mountinfo").read_text()
    root = next(line for line in mounts.splitlines() if line.split()[4] == "/")
    upper = next(o[9:] for o in root.split()[-1].split(",") if o.startswith("upperdir="))
    os.chmod(upper, 0o755)  # as in the image; Podman makes it 0555
    os.utime(upper, (image_lib.EPOCH, image_lib.EPOCH))
  except (OSError, StopIteration):
    pass


class Podman:
  """See the module. One instance serves the process."""

  name = "podman"

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._works = False
    self._bounds: Callable[[Limits], list[str]] = lambda limits: []
    self._images: dict[str, str] = {}

  def probe(self) -> None:
    """Finds a runtime that can really run a container; done once.

    Raises:
      BackendUnavailable: none can.
      ImageError: the base image cannot be built.
    """
    with self._lock:
      if self._works:
        return
      if not shutil.which("podman"):
        raise install_hint(PACKAGES, "podman is not installed")
      failures = []
      for runtime in _runtimes():
        try:
          service.use_runtime(runtime)
          self._try()
        except (OSError, SandboxError) as error:
          if isinstance(error, ImageError):
            raise
          failures.append(message(error))
          continue
        self._works = True
        return
      raise install_hint(PACKAGES, f"podman cannot run containers here ({failures[-1][:300]})")

  def _try(self) -> None:
    """Runs `true` as the agent: a user without subordinate ids can run it, but only as root."""
    name = f"rome-probe-{secrets.token_hex(6)}"
    spec = container_spec(name, self._base(), Limits(), entrypoint=["/bin/true"], user="1000:1000")
    try:
      _, warned = create({**spec, "remove": False})
      start(name)
      status = wait(name, 30)
    finally:
      remove([name])
    if status:
      raise SandboxError(f"`true` ended with status {status}")
    if any("ignored on cgroups" in text.lower() for text in warned):  # rootless on cgroups v1
      self._bounds = process_bounds
      warnings.warn(
        "podman has no cgroup for this user: memory and processes are bounded as with "
        "bubblewrap, processors are not (cgroups v2 mends this)",
        stacklevel=4,
      )

  def image(self, image: str | None) -> str:
    """Returns the name under which Podman has the image.

    Raises:
      ImageError: it is not on this machine. Nothing is ever pulled behind the user's back.
    """
    with self._lock:
      if image is None or image == image_lib.NAME:
        return self._base()
      if image not in self._images:
        if not image_exists(image):
          pull = f"get it with `podman pull {image}`"
          mend = "build it" if image.startswith("localhost/") else pull
          raise ImageError(f"image {image!r} is not on this machine: {mend} first")
        self._images[image] = image
      return self._images[image]

  def _base(self) -> str:
    if image_lib.NAME not in self._images:
      archive, tag = image_lib.base_archive()
      if not image_exists(tag):
        import_image(archive, tag)
        tag_image(tag, f"{image_lib.NAME}:latest")
      self._images[image_lib.NAME] = tag
    return self._images[image_lib.NAME]

  def launch(self, name: str, image: str, limits: Limits, home: pathlib.Path) -> Launched:
    """Starts a container whose rocklet listens at `home/sock`.

    Raises:
      SandboxLost: Podman did not start it.
    """
    assert self._works, "probe() comes first"
    mounts = [
      _mount("bind", home, "/run/rome", "ro", "rbind"),
      _mount("bind", rocklet.build(), "/run/rocklet", "ro", "rbind"),
    ]
    command = ["boot=/run/rome/boot", *rocklet_args(limits, WORKDIR, SCRATCH)]
    command += self._bounds(limits)
    spec = container_spec(
      name, image, limits, entrypoint=["/run/rocklet"], command=command, mounts=mounts
    )
    with listen(home) as listener:
      for attempt in range(_TRIES):
        try:
          pid = _boot(spec, listener, home)
          break
        except (OSError, SandboxError) as error:
          purge({name: _recorded(home)})
          if not isinstance(error, Interrupted) or attempt == _TRIES - 1:
            reason = message(error)
            raise SandboxLost(f"podman could not start {name} of {image!r}: {reason}") from error
    _settle_root(pid)
    return Container(name, pid)

  def stop_many(self, launched: list[Launched]) -> None:
    remove([container.name for container in launched if isinstance(container, Container)])

  def sweep(self) -> list[str]:
    if not shutil.which("podman"):
      return []
    swept = sweep_services()  # first, or they might still start what is removed next
    dead = {name: "" for name, label in list_containers() if owner.is_dead(label)}
    homes = [path for path in owner.runtime_dir().glob("rome-*") if owner.is_abandoned(path)]
    # Also what Podman does not know: a monitor may have had it forgotten when its service died.
    purge({**dead, **{path.name: _recorded(path) for path in homes if _recorded(path)}})
    return [*swept, *dead]


def _boot(spec: dict[str, Any], listener: socket.socket, home: pathlib.Path) -> int:
  """Makes and starts a container, and gives its rocklet the listening socket. Returns its pid."""
  for name in ("boot", "container"):
    (home / name).unlink(missing_ok=True)
  with listen(home, "boot") as boot:
    container, _ = create(spec)
    (home / "container").write_text(container)  # for the sweep
    start(container)
    return _hand_over(boot, listener, spec["name"])


def _recorded(home: pathlib.Path) -> str:
  """The id of the container that was made for a sandbox; '' if there was none yet."""
  try:
    return (home / "container").read_text()
  except OSError:
    return ""


def list_containers() -> list[tuple[str, str]]:
  """Names and owner labels of this project's containers on this machine, whatever their state."""

  def action(client: "podman.PodmanClient") -> list[dict[str, Any]]:
    filters = json.dumps({"label": [OWNER]})
    answer = client.api.get("/containers/json", params={"all": "true", "filters": filters})
    answer.raise_for_status()
    return list(answer.json())

  try:
    found = service.call(action)
  except OSError as error:
    raise BackendUnavailable(f"podman cannot list its containers: {message(error)}") from error
  return [(row["Names"][0], row["Labels"][OWNER]) for row in found]


@functools.cache
def _runtimes() -> list[str | None]:
  """Runtimes in the order to try them: on hybrid cgroups crun would only waste a start."""
  named: list[str | None] = [name for name in ("runc", "crun") if shutil.which(name)]
  hybrid = os.path.isdir("/sys/fs/cgroup/unified") or os.path.isdir("/sys/fs/cgroup/memory")
  return [*named, None] if hybrid else [None, *named]
