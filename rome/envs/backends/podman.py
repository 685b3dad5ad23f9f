"""Sandboxes in Podman containers, rootless or root, through the `podman` command.

Commands never go through Podman: rocklet listens in a directory that is mounted into the container,
so the client talks to it directly, and Podman only starts and removes containers. They carry the
labels `io.rome.owner` and `io.rome.run`.

The OCI runtime is found by trial: crun refuses hosts with hybrid cgroups, where runc works.
"""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import threading

from rome.envs import image as image_lib
from rome.envs import owner, rocklet
from rome.envs.backends import CAPABILITIES, SCRATCH, Launched, install_hint, rocklet_args
from rome.envs.common import BackendUnavailable, ImageError, Limits, SandboxError, SandboxLost

PACKAGES = "podman runc uidmap slirp4netns fuse-overlayfs"
OWNER, RUN = "io.rome.owner", "io.rome.run"
WORKDIR = "/work"
_SPARE_PIDS = 32  # room in the container for rocklet and its shells beside the agent's processes


def _podman(*args: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
  try:
    return subprocess.run(
      ["podman", *args], capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
    )
  except FileNotFoundError as error:
    raise install_hint(PACKAGES, "podman is not installed") from error
  except subprocess.TimeoutExpired as error:
    raise SandboxError(f"`podman {args[0]}` took longer than {timeout:.0f} s") from error


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
  return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


class Container:
  """A running container."""

  workdir = WORKDIR

  def __init__(self, name: str):
    self.name = name

  def reason(self) -> str:
    done = _podman("inspect", "--format", "{{json .State}}", self.name)
    if done.returncode:
      return "its container is gone"
    state = json.loads(done.stdout)
    return "out of memory" if state.get("OOMKilled") else f"its container is {state.get('Status')}"

  def stop(self) -> None:
    remove([self.name])


def remove(names: list[str]) -> None:
  """Removes containers at once; those that are gone already do not matter."""
  if names:
    _podman("rm", "--force", "--ignore", "--time", "0", *names, timeout=60 + len(names))


class Podman:
  """See the module. One instance serves the process."""

  name = "podman"

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._runtime: list[str] | None = None
    self._images: dict[str, str] = {}

  def probe(self) -> None:
    """Finds a runtime that can really run a container; done once.

    Raises:
      BackendUnavailable: none can.
      ImageError: the base image cannot be built.
    """
    with self._lock:
      if self._runtime is not None:
        return
      if not shutil.which("podman"):
        raise install_hint(PACKAGES, "podman is not installed")
      tag = self._base()
      failures = []
      for runtime in _runtimes():
        flags = self._flags(Limits(), "rome-probe")
        done = _podman("run", "--rm", *runtime, *flags, "--entrypoint", "/bin/true", tag)
        if done.returncode == 0:
          self._runtime = runtime
          return
        failures.append(_last_line(done))
      raise install_hint(PACKAGES, f"podman cannot run containers here ({failures[-1][:300]})")

  def image(self, image: str | None) -> str:
    """Returns the name under which Podman has the image.

    Raises:
      ImageError: it is not on this machine. Nothing is ever pulled behind the user's back.
    """
    with self._lock:
      if image is None or image == image_lib.NAME:
        return self._base()
      if image not in self._images:
        if _podman("image", "exists", image).returncode:
          mend = "build it" if image.startswith("localhost/") else f"get it with `podman pull {image}`"
          raise ImageError(f"image {image!r} is not on this machine: {mend} first")
        self._images[image] = image
      return self._images[image]

  def _base(self) -> str:
    if image_lib.NAME not in self._images:
      archive, tag = image_lib.base_archive()
      if _podman("image", "exists", tag).returncode:
        done = _podman("import", "--quiet", str(archive), tag, timeout=120)
        if done.returncode == 0:
          done = _podman("tag", tag, image_lib.NAME)
        if done.returncode:
          raise ImageError(f"podman cannot import the base image: {_last_line(done)}")
      self._images[image_lib.NAME] = tag
    return self._images[image_lib.NAME]

  def _flags(self, limits: Limits, name: str) -> list[str]:
    memory = f"{limits.memory_mb}m"
    size = f"size={limits.disk_mb}m"
    flags = (
      "--pull never --network none --read-only --read-only-tmpfs=false --cap-drop all "
      "--security-opt no-new-privileges --ipc private --hostname rome --no-hosts --user 0:0 "
      "--workdir / --systemd false --sdnotify ignore --log-driver none --image-volume ignore "
      "--no-healthcheck --http-proxy=false --unsetenv-all --env LC_ALL=C --env TZ=UTC "
      "--ulimit nproc=4096:4096"
    ).split()
    flags += [f"--cap-add={capability}" for capability in CAPABILITIES]
    flags += [f"--memory={memory}", f"--memory-swap={memory}", f"--cpus={limits.cpus}"]
    flags += [f"--pids-limit={limits.pids + _SPARE_PIDS}", f"--shm-size={limits.disk_mb}m"]
    # Podman's own defaults for both ulimits may exceed the host's hard limits, so both are set.
    flags += [f"--ulimit=nofile={limits.open_files}:{limits.open_files}"]
    flags += [f"--tmpfs={WORKDIR}:rw,exec,nosuid,nodev,{size}"]
    flags += [f"--tmpfs=/tmp:rw,exec,nosuid,nodev,mode=1777,{size}"]
    return [*flags, f"--label={OWNER}={owner.label()}", f"--label={RUN}={name}"]

  def launch(self, name: str, image: str, limits: Limits, home: pathlib.Path) -> Launched:
    """Starts a container whose rocklet listens at `home/sock`.

    Raises:
      SandboxLost: Podman did not start it.
    """
    assert self._runtime is not None, "probe() comes first"
    mounts = [f"--volume={home}:/run/rome:rw", f"--volume={rocklet.build()}:/run/rocklet:ro"]
    done = _podman(
      "run", "--detach", "--rm", "--name", name, *self._runtime, *self._flags(limits, name), *mounts,
      "--entrypoint", "/run/rocklet", image,
      "socket=/run/rome/sock", *rocklet_args(limits, WORKDIR, SCRATCH),
    )  # fmt: skip
    if done.returncode:
      remove([name])
      raise SandboxLost(f"podman could not start a sandbox of {image!r}: {_last_line(done)}")
    return Container(name)

  def stop_many(self, launched: list[Launched]) -> None:
    remove([container.name for container in launched if isinstance(container, Container)])

  def sweep(self) -> list[str]:
    if not shutil.which("podman"):
      return []
    names = {name: label for name, label in list_containers() if owner.is_dead(label)}
    remove(list(names))
    return list(names)


def list_containers() -> list[tuple[str, str]]:
  """Names and owner labels of all containers of this project on this machine, whatever their state."""
  form = f'{{{{.Names}}}} {{{{index .Labels "{OWNER}"}}}}'
  done = _podman("ps", "--all", "--filter", f"label={OWNER}", "--format", form)
  if done.returncode:
    raise BackendUnavailable(f"`podman ps` fails: {_last_line(done)}")
  rows = (line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
  return [(name, label) for name, label in rows]


@functools.cache
def _runtimes() -> list[list[str]]:
  """Runtimes in the order to try them: on hybrid cgroups crun would only waste a start."""
  named = [["--runtime", name] for name in ("runc", "crun") if shutil.which(name)]
  hybrid = os.path.isdir("/sys/fs/cgroup/unified") or os.path.isdir("/sys/fs/cgroup/memory")
  return [*named, []] if hybrid else [[], *named]
