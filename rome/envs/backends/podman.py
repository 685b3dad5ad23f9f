"""Sandboxes in Podman containers, rootless or root, through podman-py and a private service.

Commands never go through Podman: rocklet gets a listening socket of the host's, so the client talks
to it directly, and Podman only starts and removes containers. They carry the labels `io.rome.owner`
and `io.rome.run`.

Every sandbox has a user namespace: its root is nobody outside, and only there has rocklet the
capabilities to mount the writable root (rocklet/root.c). The container's own root is read-only.

The OCI runtime is found by trial: crun refuses hosts with hybrid cgroups, where runc works.
"""

import functools
import os
import pathlib
import re
import secrets
import shutil
import socket
import struct
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from rome.envs import image as image_lib
from rome.envs import owner, rocklet
from rome.envs.backends import (
  SCRATCH,
  Launched,
  host,
  install_hint,
  listen,
  overlay_args,
  process_bounds,
  rocklet_args,
)
from rome.envs.backends import podman_containers as containers
from rome.envs.backends import podman_images as images
from rome.envs.backends.podman_images import image_exists, import_image, tag_image
from rome.envs.backends.podman_memory import memory
from rome.envs.backends.podman_service import PACKAGES, Interrupted, message, service
from rome.envs.backends.podman_service import sweep as sweep_services
from rome.envs.backends.podman_spec import (
  OWNER,
  RUN,
  container_spec,
  mount,
  owned_by_caller,
  writable,
)
from rome.envs.common import (
  BackendUnavailable,
  HostDirectory,
  ImageError,
  Limits,
  SandboxError,
  SandboxLost,
)
from rome.envs.rocklet import client

WORKDIR = "/work"
_OLD = 600.0  # seconds after which what Podman forgot is in nobody's hands, wherever they run
_TRIES = 3  # of a start, if the service ends meanwhile


class Container:
  """A running container."""

  workdir = WORKDIR

  def __init__(self, name: str, container: str, pid: int):
    self.name = name
    self.id = container
    self.pid = pid
    self.variables: Mapping[str, str] = {}
    memory.add(name, pid)

  def reason(self) -> str:
    if memory.ran_out(self.name):
      return "out of memory"
    state = containers.state(self.name)
    if state is None:
      return "its container ended and is gone"
    if state.get("OOMKilled"):
      return "out of memory"
    if state.get("Status") == "running" and owner.start_time(self.pid) is None:
      return "its container has just ended"
    return f"its container is {state.get('Status')}"

  def stop(self) -> None:
    containers.remove([self.name])
    containers.clear([self.id])
    memory.discard(self.name)


def _hand_over(boot: socket.socket, listener: socket.socket, name: str) -> int:
  """Waits for the rocklet of a new container and gives it its socket. Returns its pid."""
  boot.settimeout(3)
  for _ in range(10):
    try:
      connection, _ = boot.accept()
      break
    except TimeoutError:
      if (containers.state(name) or {}).get("Status") not in ("created", "initialized", "running"):
        raise ConnectionError("its container ended at once") from None
  else:
    raise TimeoutError("nothing answers in its container")
  with connection:
    socket.send_fds(connection, [b"1"], [listener.fileno()])
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    connection.settimeout(30)
    refusal = connection.recv(4096)  # nothing, once its root is mounted
  if refusal:
    raise BackendUnavailable(f"the sandbox {name} cannot run: {refusal.decode(errors='replace')}")
  return int(struct.unpack("3i", peer)[0])


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
      _, warned = containers.create({**spec, "remove": False})
      containers.start(name)
      status = containers.wait(name, 30)
    finally:
      containers.remove([name])
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

  def launch(
    self,
    name: str,
    image: str,
    limits: Limits,
    home: pathlib.Path,
    directory: HostDirectory | None = None,
  ) -> Launched:
    """Starts a container whose rocklet listens at `home/sock`.

    Raises:
      SandboxError: the directory is not one to work in.
      SandboxLost: Podman did not start it.
      BackendUnavailable: the kernel does not let rocklet mount the writable root.
    """
    found = self._start(name, image, limits, home, overlay_args(limits), directory)
    if directory is not None:
      found.variables = {"HOME": "/tmp"}
    return found

  def _start(
    self,
    name: str,
    image: str,
    limits: Limits,
    home: pathlib.Path,
    args: list[str],
    directory: HostDirectory | None = None,
  ) -> Container:
    assert self._works, "probe() comes first"
    inlet = home / "inlet"
    inlet.mkdir()
    mounts = [
      mount("bind", inlet, "/run/rome", "ro", "rbind"),
      mount("bind", rocklet.build(), "/run/rocklet", "ro", "rbind"),
    ]
    if directory is not None:
      path = host.check(directory)
      for place, rw in host.places(path):
        inside = f"{WORKDIR}/{place.relative_to(path)}".removesuffix("/.")
        how = ("rw" if rw else "ro", "nosuid", "nodev", "rbind")
        mounts.append(mount("bind", place, inside, *how))
      args = [*args, "keep=1", "uid=0"]
    command = ["boot=/run/rome/boot", *rocklet_args(limits, WORKDIR, SCRATCH), *args]
    command += self._bounds(limits)
    spec = container_spec(
      name, image, limits, entrypoint=["/run/rocklet"], command=command, mounts=mounts
    )
    if directory is not None:
      spec = owned_by_caller(spec)
    if "apply=1" in args:
      spec = writable(spec)
    with listen(home) as listener:
      for attempt in range(_TRIES):
        try:
          pid = _boot(spec, listener, home)
          return Container(name, _recorded(home), pid)
        except BackendUnavailable:
          containers.purge({name: _recorded(home)})
          raise
        except (OSError, SandboxError) as error:
          containers.purge({name: _recorded(home)})
          if not isinstance(error, Interrupted) or attempt == _TRIES - 1:
            reason = message(error)
            raise SandboxLost(f"podman could not start {name} of {image!r}: {reason}") from error
    raise AssertionError("unreachable")

  def commit(
    self, image: str, tag: str, limits: Limits, snapshot: memoryview, timeout: float
  ) -> str:
    """Makes the image `localhost/TAG` of an image and a snapshot of it; returns that name.

    In the container that is committed runs nothing but rocklet, which restores the snapshot into
    the container's own root. It has no user namespace, since Podman 4 commits the owners as they
    are outside; so rocklet gives up all but four capabilities before it reads anything. The image
    has neither author nor entry point.

    Raises:
      ValueError: the tag is not one.
      SandboxError: the snapshot cannot be restored, or Podman refuses.
    """
    if not re.fullmatch(r"[a-z0-9]+([._-][a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?", tag):
      raise ValueError(f"tag {tag!r} must be a name of small letters, digits, '-', '_' and '.'")
    target = f"localhost/{tag if ':' in tag else f'{tag}:latest'}"
    name = f"rome-{secrets.token_hex(6)}"
    home = owner.new_dir(name)
    try:
      self._start(name, image, limits, home, ["apply=1"])
      connection = client.Connection(str(home / "sock"), 10.0)
      try:
        connection.send(client.RESTORE, snapshot, timeout=timeout)
        changes = ["ENTRYPOINT []", 'CMD ["/bin/bash"]', f"LABEL {OWNER}=", f"LABEL {RUN}="]
        images.commit(name, target, changes)
      finally:
        connection.close()
    finally:
      containers.remove([name])
      owner.remove_dir(home)
    return target if ":" in tag else f"localhost/{tag}"

  def stop_many(self, launched: list[Launched]) -> None:
    ours = [container for container in launched if isinstance(container, Container)]
    containers.remove([container.name for container in ours])
    containers.clear([container.id for container in ours])
    for container in ours:
      memory.discard(container.name)

  def sweep(self) -> list[str]:
    if not shutil.which("podman"):
      return []
    swept = sweep_services()  # first, or they might still start what is removed next
    dead = {
      name: "" for name, label in containers.list_containers() if owner.is_abandoned(name, label)
    }
    homes = [path for path in owner.runtime_dir().glob("rome-*") if owner.is_abandoned_dir(path)]
    # Also what Podman does not know: a monitor may have had it forgotten when its service died.
    containers.purge({**dead, **{path.name: _recorded(path) for path in homes}})
    stored = [name for name, age in containers.list_stored() if age > _OLD and _is_lone(name)]
    containers.remove(stored)
    return [*swept, *dead, *stored]


def _boot(spec: dict[str, Any], listener: socket.socket, home: pathlib.Path) -> int:
  """Makes and starts a container, and gives its rocklet the listening socket. Returns its pid."""
  for path in (home / "inlet/boot", home / "container"):
    path.unlink(missing_ok=True)
  with listen(home / "inlet", "boot") as boot:
    for path in (home / "inlet", home / "inlet/boot"):
      path.chmod(0o777)  # for the sandbox's root, who is nobody here; `home` keeps others out
    container, _ = containers.create(spec)
    (home / "container").write_text(container)  # for the sweep
    containers.start(container)
    return _hand_over(boot, listener, spec["name"])


def _is_lone(name: str) -> bool:
  """Whether it is named like a sandbox, but no sandbox of that name has a directory."""
  return bool(re.fullmatch("rome-[0-9a-f]{12}", name)) and not (owner.runtime_dir() / name).exists()


def _recorded(home: pathlib.Path) -> str:
  """The id of the container that was made for a sandbox; '' if there was none yet."""
  try:
    return (home / "container").read_text()
  except OSError:
    return ""


@functools.cache
def _runtimes() -> list[str | None]:
  """Runtimes in the order to try them: on hybrid cgroups crun would only waste a start."""
  named: list[str | None] = [name for name in ("runc", "crun") if shutil.which(name)]
  hybrid = os.path.isdir("/sys/fs/cgroup/unified") or os.path.isdir("/sys/fs/cgroup/memory")
  return [*named, None] if hybrid else [None, *named]
