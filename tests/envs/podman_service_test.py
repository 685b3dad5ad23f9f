"""The private Podman service: killed, hung, forked, left behind; containers cut off mid-start."""

import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from rome.envs import owner
from rome.envs.backends import podman, podman_containers, podman_spec
from rome.envs.backends.podman_service import PREFIX, Interrupted, PodmanService
from rome.envs.common import BackendUnavailable, SandboxError, SandboxLost
from rome.envs.sandbox import make_sandbox, sweep

pytestmark = pytest.mark.slow


@pytest.fixture
def service():
  made = PodmanService(call_timeout=2.0, ping_timeout=1.0)
  yield made
  made.stop()


def ping(service):
  return service.call(lambda client: client.ping())


def directories():
  return {path.name for path in owner.runtime_dir().iterdir() if path.name.startswith(PREFIX)}


def traces(names):
  """What containers of these names and ids left: in Podman, the runtime, monitors and cgroups."""
  found = [name for name, _ in podman_containers.list_containers() if name in names]
  for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
      command = pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
      continue
    found += [command for name in names if name in command]
  for state in pathlib.Path("/run/runc").glob("*/state.json"):
    found += [name for name in names if name in state.read_text()]
  groups = pathlib.Path("/sys/fs/cgroup").glob("*/libpod_parent/libpod-*")
  return found + [str(path) for path in groups if path.name.removeprefix("libpod-") in names]


def kill_service():
  try:
    if pid := podman.service.pid:
      os.kill(pid, signal.SIGKILL)
  except ProcessLookupError:
    pass


def eventually_no(traces_of, names):
  deadline = time.monotonic() + 30
  while time.monotonic() < deadline:
    if not traces_of(names):
      return True
    time.sleep(0.1)
  return False


def test_starts_once_for_many_callers_and_stops(service):
  before = directories()
  threads = [threading.Thread(target=ping, args=(service,)) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert service.starts == 1
  (name,) = directories() - before
  home = owner.runtime_dir() / name
  assert home.stat().st_mode & 0o777 == 0o700
  assert (home / "owner").read_text() == owner.label()
  assert (home / "process").read_text() == owner.label(service.pid)
  pid = service.pid
  service.stop()
  service.stop()
  assert directories() == before and owner.start_time(pid) is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_is_replaced_once_for_many_waiting_callers(service, number):
  assert ping(service)
  os.kill(service.pid, number)
  answers = []
  threads = [threading.Thread(target=lambda: answers.append(ping(service))) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=60)
  assert answers == [True] * 8 and service.starts == 2


def test_what_cannot_be_repeated_says_that_it_was_interrupted(service):
  def end_it(client):
    os.kill(service.pid, signal.SIGKILL)
    return client.ping()

  with pytest.raises(Interrupted, match="ended during a call"):
    service.call(end_it, repeat=False)
  with pytest.raises(Interrupted):
    service.call(end_it)  # again and again
  assert ping(service)


def test_a_slow_call_does_not_cost_the_service(service):
  name = f"rome-test-{os.getpid()}"
  spec = podman_spec.container_spec(
    name, podman.Podman()._base(), podman.Limits(), entrypoint=["/bin/sleep", "60"]
  )
  podman_containers.create(spec)
  podman_containers.start(name)
  try:
    with pytest.raises(SandboxError, match="did not answer in time"):
      service.call(lambda client: client.api.post(f"/containers/{name}/wait"))
    assert service.starts == 1
  finally:
    podman_containers.remove([name])


def test_a_service_that_cannot_start_says_why():
  service = PodmanService()
  service.use_runtime("/nonexistent/runtime")
  before = directories()
  with pytest.raises(BackendUnavailable, match="does not start: .*nonexistent"):
    ping(service)
  assert directories() == before


def test_a_forked_child_has_its_own(service):
  assert ping(service)

  def child(report):
    ping(service)
    report.put(service.pid)
    service.stop()

  context = multiprocessing.get_context("fork")
  report = context.SimpleQueue()
  process = context.Process(target=child, args=(report,))
  process.start()
  process.join(timeout=60)
  assert process.exitcode == 0 and report.get() != service.pid
  assert ping(service) and service.starts == 1


PROGRAM = """
import os, sys, time
from rome.envs.backends import podman, podman_containers, podman_spec
podman_containers.list_containers()
print(podman.service.pid, podman.service._home, flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("end", ["ordinary", "killed"])
def test_nothing_outlives_the_process(end):
  wait = "0" if end == "ordinary" else "60"
  process = subprocess.Popen(
    [sys.executable, "-c", PROGRAM, wait], stdout=subprocess.PIPE, text=True
  )
  pid, home = process.stdout.readline().split()
  if end == "killed":
    assert owner.start_time(int(pid)) and os.path.exists(home)
    process.kill()
    process.wait()
    assert os.path.basename(home) in sweep()
  else:
    assert process.wait(timeout=30) == 0
  deadline = time.monotonic() + 10
  while owner.start_time(int(pid)) and time.monotonic() < deadline:
    time.sleep(0.02)
  assert owner.start_time(int(pid)) is None and not os.path.exists(home)


def test_service_killed_in_the_middle_of_20_starts():
  """Every start succeeds or says that the sandbox is lost, and nothing is left of either."""
  make_sandbox(backend="podman").close()
  boxes, errors, names = [], [], []
  jobs = list(range(20))
  real = podman_containers.create

  def create(spec):
    names.append(spec["name"])
    container, warned = real(spec)
    names.append(container)
    return container, warned

  def work():
    while jobs:
      try:
        jobs.pop()
        boxes.append(make_sandbox(backend="podman"))
      except (SandboxLost, IndexError) as error:
        errors.append(error)

  podman_containers.create = create
  try:
    starts = podman.service.starts
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
      thread.start()
    for _ in range(6):
      time.sleep(random.uniform(0.05, 0.25))
      kill_service()
    for thread in threads:
      thread.join(timeout=120)
    assert podman.service.starts > starts and not any(t.is_alive() for t in threads)
    assert len(boxes) + len([e for e in errors if isinstance(e, SandboxLost)]) == 20
    assert [box.run("echo hi").output for box in boxes] == ["hi\n"] * len(boxes)
  finally:
    podman_containers.create = real
    for box in boxes:
      box.close()
  assert len(set(names)) >= 40
  assert eventually_no(traces, names), traces(names)


def test_manager_and_service_killed_in_the_middle_of_starts():
  """The next process finds containers that Podman has begun and knows no more of."""
  program = """
import os, threading
from rome.envs.sandbox import make_sandbox
from rome.envs.backends import podman, podman_containers, podman_spec
make_sandbox(backend="podman").close()
real = podman_containers.create
def create(spec):
  os.write(1, spec["name"].encode() + b"\\n")
  container, warned = real(spec)
  os.write(1, container.encode() + b"\\n")
  return container, warned
podman_containers.create = create
print(podman.service.pid, flush=True)
for _ in range(3):
  threading.Thread(target=lambda: [make_sandbox(backend="podman") for _ in range(9)]).start()
"""
  names = []
  for delay in (0.08, 0.16, 0.24):
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    for _ in range(3):
      names.append(process.stdout.readline().strip())
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    process.kill()
    names += process.communicate()[0].split()
    sweep()
  assert eventually_no(traces, names), traces(names)
  assert not [name for name in names if (owner.runtime_dir() / name).exists()]
