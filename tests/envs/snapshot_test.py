"""Snapshots, restores and forks of real sandboxes, and images made of them."""

import dataclasses
import os
import shlex
import struct
import subprocess
import threading

import hypothesis
import pytest
from hypothesis import strategies as st

from rome.envs import snapshot as lib
from rome.envs.common import Limits, SandboxError
from rome.envs.sandbox import make_sandbox
from rome.envs.snapshot import Snapshot, SnapshotError

# Names, kinds, owners, modes, times and contents of all files; sizes and links of directories tell
# only how the overlay keeps them.
_TREE = "find / \\( -path /proc -o -path /sys -o -path /dev \\) -prune -o"
_MANIFEST = f"""
  export LC_ALL=C
  {_TREE} -type d -print0 | sort -z | xargs -0 stat -c '%n %f %u %g TIME'
  {_TREE} ! -type d -print0 | sort -z | xargs -0 stat -c '%n %f %u %g %s %h %N TIME'
  {_TREE} -type f -print0 | sort -z | xargs -0 sha256sum
"""


def as_root(box, script, timeout=60.0):
  """The verifier would not do: it looks at the image's own programs."""
  session = box.session("root", user="root", cwd="/work")
  try:
    return session.run(f"({script}\n)", timeout)
  finally:
    session.close()


def manifest(box, times=True):
  script = _MANIFEST.replace("TIME", "%y" if times else "")
  done = as_root(box, f"({script}) > /dev/shm/m; sha256sum < /dev/shm/m; rm /dev/shm/m", timeout=60)
  assert done.exit_code == 0 and len(done.output.split()[0]) == 64, done
  return done.output


@pytest.fixture(scope="module")
def twins():
  """A second sandbox of each backend, to fork into; a reset is part of every restore."""
  started = {}

  def get(backend):
    if backend not in started:
      started[backend] = make_sandbox(backend=backend)
    return started[backend]

  yield get
  for box in started.values():
    box.close()


def test_fork_has_files_and_session(isolated):
  isolated.run("mkdir -p d/e; cd d; X=' a b'; f() { echo \"f$X\"; }; alias hi='echo hi'; umask 077")
  isolated.run("export Y=1; set -o noglob; echo 1 > x; sleep 300 & sleep 301 &")
  isolated.write_file("secret", b"s", mode=0o600, owner="root")
  with isolated.fork() as fork:
    shown = "pwd; f; hi; umask; echo *; env | grep ^Y; jobs; touch new; ls -l new"
    command = "pwd; f; hi; umask; echo *; env | grep ^Y"
    assert fork.run(command).output == isolated.run(command).output
    assert "-rw-------" in fork.run(shown).output
    assert fork.read_file("secret") == b"s" and fork.run("cat ../secret").exit_code != 0
    assert fork.stats()["processes"] == 1
    fork.run("echo changed > x")
  assert isolated.run("cat x").output == "1\n"
  snapshot = isolated.snapshot()
  assert snapshot.lost == ("sleep", "sleep") and isolated.stats()["processes"] == 3


def test_all_kinds_of_files(isolated, twins):
  isolated.run(
    "printf '\\0\\1' > $'na\\nme'; : > -- ; : > $'\\377'; mkdir -p 'a b/c'; ln -s ../etc l;"
    "mkfifo p; truncate -s 9M sparse; printf x | dd of=sparse bs=1 seek=5000000 conv=notrunc;"
    "ln sparse hard; ln l l2; ln p p2; chmod 000 'a b'; chmod 4711 hard; chmod 1777 .;"
    "touch -d 2001-02-03 $'\\377'; sh -c 'exec 3> gone; rm gone; sleep 300' & sleep 0.1"
  )
  as_root(
    isolated,
    "set -e; chown 1234:77 /work/l2 -h; chmod 2770 /var; echo changed >> /etc/passwd; "
    "rm /etc/group; rm -r /usr; mkdir /usr; echo > /usr/bin; rm /bin/wget; mkdir /bin/wget;"
    "touch /bin/wget/x;"
    "rm -r /root; ln -s /x /root; mkdir -p /opt/a; rmdir /opt/a; chmod 700 /run; echo x > /.rome",
  )
  other = isolated.fork(into=twins(isolated.backend))
  assert manifest(other) == manifest(isolated)
  shown = "cd /work; stat -c '%h %s %b' sparse hard p2 l; ls -ln; cat /proc/sys/kernel/ostype"
  assert as_root(other, shown).output == as_root(isolated, shown).output
  assert int(as_root(other, "stat -c %b /work/sparse").output) <= 16


def test_attributes(isolated, twins, tmp_path):
  """The base image has no program for them."""
  (tmp_path / "x.c").write_text("""
    #include <stdio.h>
    #include <sys/xattr.h>
    int main(int argc, char **argv) {
      char got[99] = {0};
      for (int i = 2; i < argc; i++)
        if (argv[1][0] == 's') printf("%d ", setxattr(argv[i], "user.a\\nb", argv[i], 3, 0));
        else printf("%d %s ", (int)getxattr(argv[i], "user.a\\nb", got, 98), got);
    }""")
  subprocess.run(["gcc", "-static", "-o", tmp_path / "x", tmp_path / "x.c"], check=True)
  isolated.upload(tmp_path / "x", "x")
  isolated.run("mkdir dir; touch file")
  assert as_root(isolated, "./x set dir file /etc /etc/passwd").output == "0 0 0 0 "
  other = isolated.fork(into=twins(isolated.backend))
  assert as_root(other, "./x get dir file /etc /etc/passwd").output == "3 dir 3 fil 3 /et 3 /et "


def test_deep_trees_and_many_names(isolated, twins):
  isolated.run(f"p={'d/' * 1500}; for i in 1 2; do mkdir -p $p; cd -P $p; done; touch x; cd /work")
  isolated.run("mkdir many; cd many; for i in $(seq 1000); do : > $i; done; ln 1 a; ln 1 b; cd ..")
  other = isolated.fork(into=twins(isolated.backend))
  assert other.run("ls many | wc -l; stat -c %h many/1").output == "1002\n3\n"
  assert other.snapshot().digest == isolated.snapshot().digest
  assert other.fork(into=isolated).run("ls").output == "d\nmany\n"


_NAMES = ("/work/a", "/work/b", "/work/d/a", "/work/d", "/work/d/e", "/work/we ird\n", "/work/-x")
# No links to the program that everything here is done with.
_IMAGE = ("/etc/passwd", "/etc/hosts", "/usr", "/root", "/var", "/etc", "/usr/sbin")
_OPS = (
  "echo DATA > A", "echo DATA >> A", "truncate -s 70000 A", "truncate -s 3 A", "mv A B",
  "rmdir A; mkdir A", "rm -r A; mkdir A", "mkdir -p A", "ln -sfn B A", "ln A B", "chmod 4750 A",
  "chmod 555 A", "rm -r A", "mkfifo A", "touch -d '2011-01-01 00:00:00' A",
  "printf DATA | dd of=A bs=1 seek=200000 conv=notrunc",
)  # fmt: skip


@st.composite
def _operations(draw):
  lines = []
  for _ in range(draw(st.integers(1, 12))):
    names = _NAMES + (_IMAGE if draw(st.booleans()) else ())
    first, second = draw(st.sampled_from(names)), draw(st.sampled_from(_NAMES))
    line = draw(st.sampled_from(_OPS))
    data = shlex.quote(draw(st.text("xy z", min_size=1, max_size=3)))
    line = line.replace("DATA", data)
    words = {"A": shlex.quote(first), "B": shlex.quote(second)}
    line = "".join(words.get(c, c) for c in f"[ -p A ] || {{ {line}; }}")  # a fifo would block
    if draw(st.booleans()):
      line += f"; chown -h 1000:1000 {shlex.quote(first)}"
    lines.append(line)
  return "\n".join(["mkdir -p /work/d", *lines, "exit 0"])


@pytest.mark.parametrize("examples", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_fork_is_the_same_and_stays_so(sandboxes, twins, examples):
  @hypothesis.settings(max_examples=examples, deadline=None, phases=[hypothesis.Phase.generate])
  @hypothesis.given(before=_operations(), after=_operations())
  def check(before, after):
    _check_a_fork(sandboxes, twins, before, after)

  check()


def _check_a_fork(sandboxes, twins, before, after):
  box = sandboxes("bubblewrap")
  assert as_root(box, before).exit_code == 0
  other = box.fork(into=twins("bubblewrap"))
  assert manifest(other) == manifest(box)
  said = [as_root(one, after).output for one in (box, other)]
  assert said[0] == said[1]
  assert manifest(other, times=False) == manifest(box, times=False)


def test_a_full_disk_forks_or_says_so(isolated, twins):
  isolated.run("mkdir d; ln -s x l; dd if=/dev/urandom of=big bs=1048576 count=30; ls -l big")
  other = isolated.fork(into=twins(isolated.backend))
  assert manifest(other) == manifest(isolated)
  assert "No space left" in other.run("dd if=/dev/zero of=more bs=1048576 count=1").output
  small = dataclasses.replace(Limits(), disk_mb=2)
  with make_sandbox(backend=isolated.backend, limits=small) as tight:
    with pytest.raises(SandboxError, match="empty again: restore: record .*big: No space left"):
      isolated.fork(into=tight)
    assert tight.run("ls -A").output == ""


def test_what_is_written_meanwhile_is_of_one_moment(isolated, twins):
  """The same count is written to two files, one after the other; between them is no snapshot."""
  isolated.run("echo 0 > a; echo 0 > b")
  isolated.run(
    "(i=0; while :; do i=$((i + 1)); echo $i > a2; mv a2 a; echo $i > b2; mv b2 b; done) &"
  )
  for _ in range(5):
    other = isolated.fork(into=twins(isolated.backend))
    a, b = (int(other.read_file(name)) for name in ("a", "b"))
    assert b <= a <= b + 1
  first, second = (int(isolated.run("cat b; sleep 0.3").output) for _ in range(2))
  assert second > first, "the writer went on"


def test_processes_go_on_and_the_halted_stay_halted(isolated):
  isolated.run("sleep 300 & p=$!; kill -STOP $p; (while :; do :; done) & q=$!")
  isolated.run("until grep -q 'T (stopped)' /proc/$p/status; do :; done", timeout=60)
  isolated.snapshot()
  states = isolated.run("for i in $p $q; do cut -d' ' -f3 /proc/$i/stat; done").output.split()
  assert states == ["T", "R"]
  assert isolated.run("kill -9 $p $q; echo fine").output.startswith("fine")


def test_snapshots_wait_for_their_turn(isolated):
  """Files come in, output is spooled and commands time out while snapshots are taken."""
  failures = []

  def work(action):
    try:
      for i in range(10):
        action(i)
    except Exception as error:
      failures.append(error)

  other = isolated.session("other")
  actions = [
    lambda i: isolated.write_file(f"f{i}", b"x" * 100_000),
    lambda i: other.run(f"head -c 40000 /dev/zero | tr '\\0' {i}; sleep 0.2", timeout=0.1),
    lambda i: isolated.snapshot(),
  ]
  threads = [threading.Thread(target=work, args=[action]) for action in actions]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=120)
  assert not failures and not any(thread.is_alive() for thread in threads)
  assert isolated.run("cat f? | wc -c").output == "1000000\n"
  other.close()


def test_save_and_load(isolated, twins, tmp_path):
  isolated.run("cd /tmp; X=3; echo data > /work/f")
  taken = isolated.snapshot()
  path = tmp_path / "s"
  taken.save(path)
  assert os.listdir(tmp_path) == ["s"]
  loaded = Snapshot.load(path)
  assert (loaded.digest, loaded.size, loaded.state) == (taken.digest, taken.size, taken.state)
  other = twins(isolated.backend)
  other.restore(loaded)
  assert other.run("cat /work/f; pwd; echo $X").output == "data\n/tmp\n3\n"
  whole = path.read_bytes()
  for spoilt in (whole[:-1], whole[:100], b"", whole.replace(b"data\n", b"date\n"), b"{}\n",
                 whole.replace(b'"size": ', b'"size": 1')):  # fmt: skip
    path.write_bytes(spoilt)
    with pytest.raises(SnapshotError, match="no snapshot, or damaged"):
      Snapshot.load(path)


def _record(kind, name=b"", rest=b""):
  return kind + struct.pack("<H", len(name)) + name + rest


_META = struct.pack("<4Iq", 0o755, 0, 0, 0, 0)
_DIR, _END = _META + b"\0\0", _record(b"U")
_FILE = _META + b"\0\0\0\0\0\0"
_HOSTILE = {
  "a path": _record(b"F", b"../../x", _FILE),
  "dots": _record(b"D", b"..", _DIR),
  "a slash": _record(b"X", b"/etc"),
  "a NUL": _record(b"X", b"a\0b"),
  "no name": _record(b"X"),
  "a long name": b"X" + struct.pack("<H", 300) + b"a" * 300,
  "the kernel's": _record(b"D", b"proc", _DIR),
  "no kind": _record(b"Z", b"a"),
  "a link of nothing": _record(b"H", b"a", struct.pack("<I", 7)),
  "a mode": _record(b"D", b"a", struct.pack("<4Iq", 0o100755, 0, 0, 0, 0) + b"\0\0"),
  "an attribute": _record(b"D", b"a", _META + b"\1\0\x05other\0\0\0\0"),
  "data beyond the end": _record(b"F", b"a", _FILE + struct.pack("<5Q", 1, 0, 5, 0, 0)),
  "runs in disorder": _record(b"F", b"a", _FILE + struct.pack("<3Q", 9, 5, 1) + b"a"
                              + struct.pack("<2Q", 1, 1) + b"b"),
  "a link to the host": _record(b"L", b"a", _META + b"\0\0\0\0\1\0/")
                        + _record(b"F", b"a/b", _FILE),
  "one leave too many": _END + _END,
  "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("what", _HOSTILE)
def test_a_hostile_stream_is_refused(sandboxes, what):
  box = sandboxes("bubblewrap")
  data = b"ROMESNP\1" + _record(b"D", b"", _DIR) + _HOSTILE[what] + _END + b"\0" * 20
  bad = Snapshot("0" * 64, box.image, memoryview(data), b"")
  with pytest.raises(SandboxError, match="is empty again: restore: record [0-9]+"):
    box.restore(bad)
  assert box.run("ls -A; echo fine").output == "fine\n"


def test_a_cut_or_changed_stream_is_refused(sandboxes):
  box = sandboxes("bubblewrap")
  box.run("echo hello > f")
  good = box.snapshot()
  for end in (0, 7, 8, 20, good.size - 1):
    cut = dataclasses.replace(good, data=good.data[:end])
    with pytest.raises(SandboxError, match="empty again: restore: record"):
      box.restore(cut)
  changed = bytes(good.data).replace(b"hello", b"HELLO")
  with pytest.raises(SnapshotError, match="does not hold what was restored"):
    box.restore(dataclasses.replace(good, data=memoryview(changed)))
  box.restore(good)
  assert box.run("cat f").output == "hello\n"
  with pytest.raises(ValueError, match="the snapshot is of image 'other'"):
    box.restore(dataclasses.replace(good, image="other"))


def test_where_there_are_no_snapshots(sandboxes):
  with pytest.raises(SandboxError, match="snapshot: Operation not supported"):
    sandboxes("process").snapshot()
  with pytest.raises(SandboxError, match="bubblewrap backend has no images; use podman"):
    sandboxes("bubblewrap").commit("x")


@pytest.mark.slow
def test_commit_makes_an_image_of_the_change(sandboxes):
  box = sandboxes("podman")
  name = "localhost/rome-test-commit:one"
  as_root(box, "echo hi > /etc/new; rm /bin/wget; echo me > /etc/hostname; chown 1234 /root")
  box.run("echo mine > mine; ln mine two; mkdir d; ln -s d l; chmod 640 mine")
  try:
    assert box.commit("rome-test-commit:one") == name
    config = subprocess.run(
      ["podman", "inspect", "--format", "{{.Config.Entrypoint}} {{.Config.Cmd}}", name],
      check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert config.stdout.split() == ["[]", "[/bin/bash]"]
    with make_sandbox(name, "podman") as made:
      assert manifest(made, times=False) == manifest(box, times=False)
      assert made.run("cat mine; stat -c %h mine").output == "mine\n2\n"
    with pytest.raises(ValueError, match="must be a name of small letters"):
      box.commit("../x")
  finally:
    subprocess.run(["podman", "rmi", "-f", name], capture_output=True)


def test_a_spool_is_no_file_of_the_host(tmp_path, monkeypatch):
  monkeypatch.setattr(lib.tempfile, "tempdir", str(tmp_path))
  spool = lib.Spool()
  spool.add(b"abc")
  data = spool.finish()
  assert bytes(data) == b"abc" and os.listdir(tmp_path) == []


def test_a_header_that_is_nested_too_deeply_is_damaged(tmp_path):
  (tmp_path / "deep").write_bytes(b"[" * 500_000 + b"\n")
  with pytest.raises(SnapshotError, match="damaged"):
    Snapshot.load(tmp_path / "deep")
