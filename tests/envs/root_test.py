"""The writable root: what is in it, its limit, its reset, and that nobody leaves it."""

import pytest

from rome.envs.backends import podman_spec
from rome.envs.common import BackendUnavailable, Limits, SandboxError, SandboxLost
from rome.envs.sandbox import make_sandbox


def test_root_writes_everywhere_and_a_reset_undoes_it(isolated):
  # Summed up, as a long output would be put into a file below /tmp meanwhile.
  places = "bin etc root run sbin tmp usr var work dev/shm"
  listing = f"cd /; (ls -laR {places}; ls -la / | grep -v proc) | sha256sum"
  before = isolated.run(listing, timeout=30).output
  done = isolated.verify(
    "set -e; echo x > /etc/new; rm /etc/passwd; rm -r /usr; mkdir /usr; touch /usr/a; mv /bin /b;"
    "/b/ln -s /nowhere /bin; PATH=/b; chmod 700 /root; rm -rf /tmp; mkdir -p /run/rome; echo done"
  )
  assert done.output == "done\n"
  isolated.reset()
  assert isolated.run(listing, timeout=30).output == before


def test_one_limit_for_all_places(isolated):
  disk = Limits().disk_mb
  script = f"""
    for place in /work /tmp /etc /var; do
      dd if=/dev/zero of=$place/big bs=1048576 count={disk // 4 + 1} 2>&1
    done | grep -c 'No space left'
    dd if=/dev/zero of=/dev/shm/big bs=1048576 count={disk + 1} 2>&1 | grep -c 'No space left'
    echo $(cat /work/big /tmp/big /etc/big /var/big | wc -c) $(wc -c < /dev/shm/big)
  """
  rows = isolated.verify(script).output.split()
  assert rows[:2] == ["1", "1"]
  assert int(rows[2]) <= disk << 20 and int(rows[3]) == disk << 20
  inodes = "i=0; while : > n$i; do i=$((i + 1)); done 2>/dev/null; echo $i"
  isolated.reset()
  assert 1000 < int(isolated.run(inodes, timeout=60).output) <= disk * 256 + 4096


def test_other_places_are_read_only_for_root_too(isolated):
  script = """
    for place in / /proc /sys /dev $(cut -d' ' -f2 /proc/mounts); do
      [ -d "$place" ] && (: > "$place/written") 2>/dev/null && echo "$place"
    done | sort -u | tr '\\n' ' '
  """
  # mqueue holds no bytes: the rlimit for it is zero, and an attempt says "too many open files".
  assert isolated.verify(script).output == "/ /dev/shm "


def test_root_inside_has_no_way_out(isolated):
  script = """
    for path in /proc/1/root/etc /proc/1/cwd/etc /proc/1/fd/3 /proc/1/mem /proc/1/environ \
        /proc/1/task/1/root/etc /proc/1/map_files/x /proc/1/ns/mnt; do
      cat "$path" >/dev/null 2>&1 && echo "read $path"
      ls "$path/" >/dev/null 2>&1 && echo "listed $path"
    done
    echo 900 > /proc/1/oom_score_adj && echo adjusted
    chroot / true && echo chroot
    mount -t tmpfs none /tmp && echo mount
    umount /proc && echo umount
    unshare -m true && echo unshare
    mknod /tmp/node c 1 3 && echo mknod
    ls -A /run
    grep -c /run/rome /proc/mounts
  """
  # The overlay's own line names its layers, and nothing else does.
  assert isolated.verify(f"({script}) 2>/dev/null").output == "1\n"


@pytest.mark.slow
def test_root_inside_is_nobody_outside(sandboxes):
  inside, outside, count = sandboxes("podman").run("cat /proc/self/uid_map").output.split()
  assert (inside, count) == ("0", "65536") and int(outside) >= 1 << 30


def test_root_keeps_few_capabilities(isolated):
  status = isolated.verify("cat /proc/self/status").output
  for name in ("CapPrm", "CapEff", "CapBnd"):
    assert f"{name}:\t00000000000000eb" in status
  status = isolated.run("cat /proc/self/status").output
  for name in ("CapPrm", "CapEff", "CapBnd"):
    assert f"{name}:\t0000000000000000" in status


def test_a_link_of_roots_leads_no_file_operation_out(isolated):
  """Root may put links where rocklet, which is outside, looks for directories."""
  isolated.verify("cd /; mv work w; ln -s /w work; mv tmp t; ln -s / tmp; ln -s / up")
  for path in ("/work/x", "/up/etc/passwd", "/tmp/x"):
    with pytest.raises(SandboxError, match="directory"):
      isolated.write_file(path, b"")
  assert isolated.read_file("/etc/hostname") == b"rome\n"
  assert "left out" in isolated.run("head -c 100000 /dev/zero | tr '\\0' x").output


def test_a_process_sees_only_the_sandbox(isolated):
  shown = isolated.run("cd ..; cd /proc/self/cwd/../../..; pwd; ls -A /; readlink /proc/self/root")
  assert shown.output.splitlines()[0] == "/" and shown.output.endswith("\n/\n")
  assert "upper" not in shown.output and "scratch" not in shown.output


def test_a_kernel_that_refuses_is_named(monkeypatch):
  from rome.envs.backends import bubblewrap

  monkeypatch.setattr(
    bubblewrap, "CAPABILITIES", [c for c in bubblewrap.CAPABILITIES if c != "SYS_ADMIN"]
  )
  with pytest.raises(SandboxLost, match="writable root cannot be made .* Linux 5.13 or later"):
    make_sandbox(backend="bubblewrap")


@pytest.mark.slow
def test_a_kernel_that_refuses_podman_is_named(monkeypatch):
  fewer = [c for c in podman_spec.CAPABILITIES if c != "SYS_ADMIN"]
  monkeypatch.setattr(podman_spec, "CAPABILITIES", fewer)
  with pytest.raises(BackendUnavailable, match="writable root cannot be made .*Linux 5.13"):
    make_sandbox(backend="podman")
