"""The fleet over a real Ray cluster of two nodes on this machine; one of its workers is killed."""

import os
import shutil
import signal
import tempfile
import time

import pytest

from rome.envs import owner
from rome.envs.admission import CapacityExceeded, needs
from rome.envs.common import Limits, SandboxError, SandboxLost, SandboxSpec
from rome.envs.fleet import Fleet
from rome.envs.placement import add
from rome.envs.queueing import QueueTimeout
from rome.envs.sandbox import sweep

pytestmark = pytest.mark.slow

LIMITS = Limits(memory_mb=64, cpus=0.5, pids=32, disk_mb=4)
SPEC = SandboxSpec(backend="bubblewrap", limits=LIMITS)
EACH = add([needs(LIMITS)] * 3)  # room for three on each host


def eventually(condition, seconds=90.0):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if condition():
      return True
    time.sleep(0.05)
  return False


@pytest.fixture(scope="module")
def fleet():
  directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short enough for a socket's path
  os.mkdir(f"{directory}/ray")
  monkeypatch = pytest.MonkeyPatch()
  for name, value in (
    ("RAY_TMPDIR", directory),
    ("RAY_USAGE_STATS_ENABLED", "0"),
    ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),
    # Or Ray takes 127.0.0.1 for the address of a network card, and connects to that.
    ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0"),
  ):
    monkeypatch.setenv(name, value)
  import ray
  from ray._private import ray_constants, services
  from ray.cluster_utils import Cluster

  # Read before anything is asked: the question itself would look outside the loopback.
  assert not ray_constants.ENABLE_RAY_CLUSTER, "ray was imported before this test set it up"
  assert services.get_node_ip_address() == "127.0.0.1"
  options = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
  options |= {"node_ip_address": "127.0.0.1"}
  cluster, fleet = Cluster(), None
  try:
    cluster.add_node(**options)
    cluster.add_node(**options)
    ray.init(address=cluster.address, log_to_driver=False, _node_ip_address="127.0.0.1")
    fleet = Fleet(EACH, strategy="spread", interval=0.3)
    assert eventually(lambda: len(fleet.hosts()) == 2), fleet.metrics()
    yield fleet
  finally:
    if fleet is not None:
      fleet.close()
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(directory, ignore_errors=True)
    monkeypatch.undo()
    sweep()


def test_sandboxes_of_two_hosts_have_the_interface_of_one_here(fleet):
  one, two = fleet.create(SPEC, tenant="me"), fleet.create(SPEC)
  assert one.host != two.host and {one.host, two.host} == set(fleet.hosts())
  box = one.sandbox
  assert box.host == one.host and box.workdir and box.backend == "bubblewrap" and box.alive()
  box.write_file("greeting", b"hello")
  assert box.run("cat greeting").output == box.read_file("greeting").decode() == "hello"
  result = box.run("sleep 5", timeout=0.2)
  assert result.timed_out and result.exit_code is None
  with box.session("second") as session:
    session.run("x=1")
    assert session.run("echo $x").output == "1\n"
  assert box.run("echo [$x]").output == "[]\n"
  with pytest.raises(SandboxError, match="nothing"):
    box.read_file("nothing")
  with pytest.raises(AttributeError):
    box.no_such_method  # noqa: B018
  assert not two.sandbox.run("ls").output
  for record in (one, two):
    fleet.delete(record.id)
  assert eventually(lambda: fleet.metrics()["used_pids"] == 0)
  with pytest.raises(SandboxLost):
    box.run("echo hi")


def test_trees_cross_in_parts(fleet, tmp_path):
  record = fleet.create(SPEC)
  tree = tmp_path / "tree"
  (tree / "sub").mkdir(parents=True)
  (tree / "sub" / "run.sh").write_text("echo ran")
  (tree / "sub" / "run.sh").chmod(0o775)
  os.link(tree / "sub" / "run.sh", tree / "again.sh")
  (tree / "big").write_bytes(os.urandom(3 << 20))
  box = record.sandbox
  box.upload(tree, "tree")
  assert box.run("tree/sub/run.sh; stat -c %a tree/sub/run.sh").output == "ran\n775\n"
  box.download("tree", tmp_path / "back")
  assert (tmp_path / "back" / "big").read_bytes() == (tree / "big").read_bytes()
  assert (tmp_path / "back" / "again.sh").read_text() == "echo ran"
  with pytest.raises(FileExistsError):
    box.download("tree", tmp_path / "back")
  (tree / "link").symlink_to("/etc/passwd")
  with pytest.raises(SandboxError, match="neither a file nor a directory"):
    box.upload(tree, "other")
  box.close()
  assert record.state == "stopped"
  assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "tree"]


def test_capacity_holds_over_all_hosts(fleet):
  records = [fleet.create(SPEC) for _ in range(6)]
  assert sorted(records.count(r) for r in records) == [1] * 6
  per_host = [sum(r.host == host for r in records) for host in fleet.hosts()]
  assert per_host == [3, 3]
  with pytest.raises(QueueTimeout, match="free of"):
    fleet.create(SPEC, deadline=0.5)
  with pytest.raises(CapacityExceeded, match="no host of the fleet"):
    fleet.create(SandboxSpec(backend="bubblewrap", limits=Limits(memory_mb=1024)))
  waiting = fleet.create(SPEC, wait=False)
  fleet.stop(records[0].id)
  assert waiting.settled.wait(60) and waiting.host == records[0].host
  for record in [*records, waiting]:
    fleet.delete(record.id)
  assert eventually(lambda: fleet.metrics()["used_pids"] == 0)


def test_a_lost_worker_takes_only_its_own_and_rejoins(fleet):
  import ray

  records = [fleet.create(SPEC) for _ in range(4)]
  host = records[0].host
  doomed = [r for r in records if r.host == host]
  others = [r for r in records if r.host != host]
  assert len(doomed) == len(others) == 2
  boxes = [r.sandbox for r in doomed]
  link = fleet._stock._links[host]
  _, pid = ray.get(link.actor.hello.remote())
  os.kill(pid, signal.SIGKILL)
  with pytest.raises(SandboxLost, match=host):
    boxes[0].run("sleep 30", timeout=60)
  assert eventually(lambda: all(r.state == "failed" for r in doomed))
  assert all(f"host {host} is lost" in r.error for r in doomed)
  assert all(r.state == "running" for r in others)
  assert others[0].sandbox.run("echo well").output == "well\n"
  assert eventually(lambda: host in fleet.hosts())  # with a new worker
  metrics = fleet.metrics()
  assert metrics["total_hosts_lost"] == 1 and metrics["total_hosts_joined"] == 3
  again = fleet.create(SPEC, deadline=60)
  assert again.host == host and again.sandbox.run("echo back").output == "back\n"
  for record in [*others, again]:
    fleet.delete(record.id)
  assert eventually(lambda: fleet.metrics()["used_pids"] == 0)


def test_a_sandbox_that_dies_by_itself_is_told_with_its_reason(fleet):
  record, neighbour = fleet.create(SPEC), fleet.create(SPEC)
  label = (owner.runtime_dir() / record.sandbox.id / "process").read_text()
  os.kill(int(label.split(":")[2]), signal.SIGKILL)
  assert eventually(lambda: fleet.get(record.id).state == "failed")
  assert "its process ended with status" in record.error
  assert fleet.metrics()["used_pids"] == needs(LIMITS).pids  # its room is free again
  assert neighbour.sandbox.run("echo well").output == "well\n"
