"""Handles: uploads and downloads in parts, names and kinds of files, and rubbish on the wire."""

import concurrent.futures
import contextlib
import hashlib
import os
import random
import socket
import struct
import subprocess
import time

import pytest

from rome.envs.channel import FIXED_MTIME_NS
from rome.envs.common import SandboxError, SandboxLost
from rome.envs.rocklet import client

MIB = 1 << 20


def test_upload_in_parts(sandbox):
  data = random.randbytes(3 * MIB + 17)
  with sandbox.open_upload("d/big", mode=0o640) as upload:
    upload.write(data[:MIB])
    assert upload.offset == MIB
    hidden = sandbox.run("ls -An d").output
    assert "big" not in hidden and ".rome-" in hidden and "-rw-------" in hidden
    upload.write(data[MIB:])
    assert upload.finish() == hashlib.sha256(data).hexdigest()
  assert sandbox.run("ls -A d; sha256sum < d/big").output.split() == [
    "big",
    hashlib.sha256(data).hexdigest(),
    "-",
  ]
  found = sandbox.lstat("d/big")
  assert (found.kind, found.mode, found.size) == ("file", 0o640, len(data))
  assert found.mtime_ns == FIXED_MTIME_NS
  with sandbox.open_download("d/big") as download:
    assert (download.size, download.stat.mode) == (len(data), 0o640)
    assert download.read(MIB - 3, 6) == data[MIB - 3 : MIB + 3]
    assert download.read(3 * MIB, 100) == data[3 * MIB :]
    assert b"".join(download.parts()) == data
    with pytest.raises(SandboxError, match="beyond the end"):
      download.read(len(data) + 1, 1)


def test_upload_owner_and_secrecy(isolated):
  with isolated.open_upload("mine") as mine, isolated.open_upload("roots", 0o600, "root") as roots:
    mine.write(b"secret")
    assert isolated.run("cat .rome-*").exit_code != 0
    mine.finish()
    roots.write(b"secret")
    roots.finish()
  assert isolated.run("cat mine").output == "secret"
  assert isolated.run("cat roots").exit_code != 0
  assert (isolated.lstat("mine").uid, isolated.lstat("roots").uid) == (1000, 0)


def test_expected_digest_and_drop(isolated):
  good = hashlib.sha256(b"data").hexdigest()
  isolated.write_file("f", b"before")
  with isolated.open_upload("f") as upload:
    upload.write(b"date")
    with pytest.raises(SandboxError, match=f"'f' has sha256 .*, not {good}"):
      upload.finish(good)
  assert isolated.read_file("f") == b"before"
  with isolated.open_upload("f") as upload:
    upload.write(b"data")
    upload.finish(good.upper())
    upload.drop()
  assert isolated.read_file("f") == b"data"
  with isolated.open_upload("g") as upload:
    upload.write(b"x")
  assert isolated.run("ls -A").output == "f\n"


def test_upload_goes_on_after_its_connection_broke(isolated):
  data = random.randbytes(5 * MIB)
  with isolated.open_upload("f") as upload:
    upload.write(data[: 2 * MIB])
    upload._channel.close()
    with pytest.raises(SandboxLost):
      upload.write(data[2 * MIB :])
    upload.resume()
    assert upload.offset == 2 * MIB
    upload.write(data[upload.offset :])
    assert upload.finish() == hashlib.sha256(data).hexdigest()
  assert isolated.read_file("f") == data


@pytest.mark.slow
def test_what_cannot_be_resumed(isolated):
  with isolated.open_upload("f") as upload:
    upload.finish()
  with pytest.raises(SandboxError, match="'f'.*No such file"):
    upload.resume()
  upload._channel.close()


def _hidden(box):
  return int(box.run("ls -A | grep -c '^.rome-'").output)


def test_few_broken_uploads_are_kept(isolated):
  uploads = [isolated.open_upload(str(i)) for i in range(6)]
  assert _hidden(isolated) == 6
  for upload in uploads:
    upload._channel.close()
  deadline = time.monotonic() + 30
  while _hidden(isolated) > 4 and time.monotonic() < deadline:
    time.sleep(0.02)
  assert _hidden(isolated) == 4


@pytest.mark.slow
def test_a_broken_upload_is_dropped_in_time(sandboxes):
  isolated = sandboxes("bubblewrap")
  upload = isolated.open_upload("f")
  upload.write(b"x")
  upload._channel.close()
  start = time.monotonic()
  while _hidden(isolated) and time.monotonic() < start + 120:
    time.sleep(0.5)
  assert 50 < time.monotonic() - start < 110
  assert isolated.run("ls -A").output == ""


def test_upload_goes_on_where_only_the_answer_was_lost(isolated):
  with isolated.open_upload("f") as upload:
    upload.write(b"a" * 10)
    upload._unconfirmed = b"b" * 10  # as `write` leaves it
    upload._channel.request(client.FILE_WRITE, "f", b"b" * 10, offset=10)
    upload._channel.close()
    upload.resume()
    assert upload.offset == 20
    with pytest.raises(SandboxError, match="20 bytes already, not 10"):
      upload.offset = 10
      upload.write(b"c")
    upload.offset = 20
    assert upload.finish() == hashlib.sha256(b"a" * 10 + b"b" * 10).hexdigest()
  assert isolated.read_file("f") == b"a" * 10 + b"b" * 10


@pytest.mark.slow
def test_reset_drops_uploads(isolated):
  running, broken = isolated.open_upload("f"), isolated.open_upload("g")
  for upload in (running, broken):
    upload.write(b"x")
  broken._channel.close()
  isolated.reset()
  assert isolated.run("ls -A").output == ""
  with pytest.raises(SandboxError, match="no such file is open"):
    running.write(b"y")
  running.drop()
  with pytest.raises(SandboxError):
    broken.resume()
    broken.write(b"y")
  broken.drop()
  assert isolated.run("ls -A").output == ""


def test_the_agent_cannot_put_its_own_in_the_place_of_an_upload(isolated):
  for trick in (
    "rm .rome-*",
    "mv .rome-* x; echo evil > $(basename $OLD)",
    "cd ..; mv d e; mkdir d",
  ):
    isolated.reset()
    isolated.run("mkdir d")
    with isolated.open_upload("d/f", owner="root") as upload:
      upload.write(b"good")
      isolated.run(f"cd d; OLD=$(echo .rome-*); {trick}")
      with pytest.raises(SandboxError, match="'d/f'.*changed, moved or replaced"):
        upload.finish()
    assert isolated.run("cat d/f e/f").exit_code != 0


def test_a_directory_that_became_a_link_is_not_followed(isolated):
  isolated.write_file("/tmp/root/keep", b"", mode=0o600, owner="root")
  with isolated.open_upload("d/f") as upload:
    upload.write(b"x")
    isolated.run("mv d e; ln -s /tmp/root d")
    with pytest.raises(SandboxError, match="'d/f'.*symbolic link"):
      upload.finish()
  assert isolated.run("ls -A /tmp/root; ls -A e").output == "keep\n"


def test_a_file_that_changes_is_no_download(isolated):
  size = 3 * MIB
  for change in ("truncate -s 100 f", "echo more >> f", "printf x | dd of=f conv=notrunc"):
    isolated.write_file("f", b"x" * size)
    with isolated.open_download("f") as download:
      isolated.run(change)
      with pytest.raises(SandboxError, match="'f'.*changed"):
        list(download.parts())
  isolated.write_file("f", b"x" * size)
  with isolated.open_download("f") as download:
    isolated.run("rm f")  # its name does not matter
    assert sum(map(len, download.parts())) == size


def test_kinds_that_are_no_files(isolated):
  isolated.run("mkfifo p; ln -s f l; mkdir d; ln -s d dl; echo x > f; ln f h; : > d/x")
  isolated.run("nc -lU s & sleep 0.3", timeout=5)
  cases = {"p": "no regular file", "l": "symbolic link", "d": "directory", "dl/x": "symbolic link"}
  for path, why in cases.items():
    with pytest.raises(SandboxError, match=f"{path!r}.*{why}"):
      isolated.read_file(path)
  for path in ("dl/x", "l/x", "f/x", "d"):
    with pytest.raises(SandboxError, match=repr(path)):
      isolated.write_file(path, b"")
    with pytest.raises(SandboxError, match=repr(path)):
      isolated.open_upload(path)
  for path in ("/dev/zero", "/dev/null"):
    with pytest.raises(SandboxError, match=f"{path!r}.*no regular file"):
      isolated.read_file(path)
  kinds = {name: isolated.lstat(name).kind for name in ("p", "l", "d", "f")}
  assert kinds == {"p": "other", "l": "link", "d": "directory", "f": "file"}
  for name in ("p", "l", "h"):  # replaced, never written through
    isolated.write_file(name, b"new")
    assert isolated.read_file(name) == b"new"
  assert isolated.run("cat f; ls -A d").output == "x\nx\n"


def test_names_of_all_bytes(sandbox):
  names = ["a\nb", "\udcff\udcfe", "x" * 255, "-rf", "$(touch pwned)", "*", " ", "\x01", "é", "\\"]
  for name in names:
    sandbox.write_file(name, os.fsencode(name))
    assert sandbox.read_file(name) == os.fsencode(name)
  assert sandbox.run("set -- *; echo $#").output == f"{len(names)}\n"
  with pytest.raises(SandboxError, match="too long"):
    sandbox.write_file("x" * 256, b"")
  with pytest.raises(SandboxError, match="more than allowed"):
    sandbox.lstat("a/" * 2100)
  for path in ("a/../b", "..", "a\0b", "", "//"):
    for call in (sandbox.lstat, sandbox.remove, sandbox.open_upload, sandbox.open_download):
      with pytest.raises(SandboxError, match="must name something"):
        call(path)


LEASE = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>
int main(void) {
  signal(SIGIO, SIG_IGN);
  return fcntl(open("f", O_RDWR), F_SETLEASE, F_WRLCK) || write(1, "held\\n", 5) < 0 || pause();
}
"""


def test_a_lease_does_not_hold_a_download(isolated, tmp_path):
  """Who opens a leased file waits for its holder, 45 seconds, unless told not to."""
  program = tmp_path / "lease"
  command = ["gcc", "-static", "-x", "c", "-o", str(program), "-"]
  subprocess.run(command, input=LEASE.encode(), check=True)
  isolated.upload(program, "lease")
  isolated.run("echo x > f; ./lease > told & while ! grep -q held told; do sleep 0.02; done")
  start = time.monotonic()
  with pytest.raises(SandboxError, match="'f'.*holds a lease"):
    isolated.read_file("f")
  assert time.monotonic() - start < 30
  isolated.write_file("f", b"new")  # the name is anybody's
  assert isolated.read_file("f") == b"new"


def test_sparse_files_count_by_their_length(isolated):
  isolated.run("truncate -s 8M bomb; truncate -s 0 empty")
  found = isolated.lstat("bomb")
  assert found.size == 8 * MIB and found.blocks == 0
  with pytest.raises(SandboxError, match="'bomb'.*larger than the limit"):
    isolated.read_file("bomb", max_bytes=8 * MIB - 1)
  assert isolated.read_file("bomb", max_bytes=8 * MIB) == bytes(8 * MIB)
  assert isolated.read_file("empty", max_bytes=0) == b""


def test_files_of_the_kernel_are_not_taken_for_empty(isolated):
  with pytest.raises(SandboxError, match="'/proc/self/status'"):
    isolated.read_file("/proc/self/status")


def test_a_hard_link_to_a_secret_of_roots_is_not_read(isolated):
  isolated.write_file("secret", b"s", mode=0o600, owner="root")
  assert isolated.read_file("secret") == b"s"
  # Where the kernel protects hard links only root can make this one: so the verifier does.
  assert isolated.verify("ln secret public").exit_code == 0
  with pytest.raises(SandboxError, match="'public'.*may not read"):
    isolated.read_file("public")


def test_new_directories_belong_to_the_agent(isolated):
  isolated.write_file("a/b/c", b"")
  isolated.write_file("/tmp/r/s/c", b"", owner="root")
  isolated.write_file("/tmp/r/s/t/c", b"")  # below directories of root's
  listing = isolated.run("stat -c '%u %a %n' a a/b /tmp/r /tmp/r/s /tmp/r/s/t").output
  assert listing.splitlines() == [
    "1000 755 a",
    "1000 755 a/b",
    "0 755 /tmp/r",
    "0 755 /tmp/r/s",
    "1000 755 /tmp/r/s/t",
  ]


def test_a_full_disk_keeps_the_upload_at_its_offset(isolated):
  with isolated.open_upload("f") as upload:
    with pytest.raises(SandboxError, match="No space left"):
      for _ in range(40):
        upload.write(bytes(MIB))
    assert 8 * MIB < upload.offset < 20 * MIB
    with pytest.raises(SandboxError, match="No space left"):
      upload.write(bytes(MIB))
  assert isolated.run("ls -A").output == ""


def test_transfers_do_not_wait_for_commands(isolated):
  waits = "touch begun; until [ -e f ]; do sleep 0.02; done"  # for the transfer
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    running = pool.submit(isolated.run, waits, timeout=20.0)
    while not running.done():
      with contextlib.suppress(SandboxError):
        isolated.lstat("begun")
        break
    isolated.write_file("f", b"x")
    assert isolated.read_file("f") == b"x"
    assert running.result().exit_code == 0


def test_transfers_work_under_a_fork_bomb(isolated):
  isolated.run("b() { b | b & }; b", timeout=0.5)
  isolated.write_file("f", b"x")
  assert isolated.read_file("f") == b"x"


def test_remove(sandbox):
  sandbox.write_file("out/keep", b"k")
  sandbox.run("mkdir -p d/e/f; ln -s ../out d/l; ln -s ../../out d/e/l; mkfifo d/p; : > d/e/f/x")
  sandbox.run("ln -s out top")
  sandbox.remove("d")
  sandbox.remove("top")
  assert sandbox.run("ls -A; cat out/keep").output == "out\nk"
  sandbox.remove("out/keep")
  with pytest.raises(SandboxError, match="'out/keep'.*No such file"):
    sandbox.remove("out/keep")
  for path in (".", sandbox.workdir, "./."):
    with pytest.raises(SandboxError, match="work directory"):
      sandbox.remove(path)


@pytest.mark.slow
def test_remove_a_deep_and_a_wide_tree(isolated):
  """Deeper than a path can name; mkdir and cd go down relative to where they are."""
  result = isolated.run(
    "mkdir t; cd t; p=$(printf 'd/%.0s' $(seq 1000)); for i in 1 2 3 4 5 6 7 8 9 10; do"
    " mkdir -p $p; cd $p; done; touch x; cd / && cd - > /dev/null; true",
    timeout=60,
  )
  assert result.exit_code == 0, result
  isolated.remove("t")
  isolated.run(
    f"cd {isolated.workdir}; mkdir w; cd w; touch $(seq 3000); mkdir d$(seq -s ' d' 300)"
  )
  isolated.remove("w")
  assert isolated.run(f"cd {isolated.workdir}; ls -A").output == ""


def test_files_of_the_image_are_replaced_and_removed(isolated):
  before = isolated.read_file("/etc/passwd")
  isolated.write_file("/etc/new/x", b"x")
  assert (isolated.lstat("/etc/new").uid, isolated.lstat("/etc").uid) == (1000, 0)
  isolated.write_file("/etc/passwd", b"other", owner="root")
  assert isolated.run("cat /etc/passwd").output == "other"
  isolated.remove("/etc")
  assert isolated.run("ls /etc").exit_code != 0
  isolated.reset()
  assert isolated.read_file("/etc/passwd") == before


def test_remove_is_bounded(isolated):
  isolated.run("mkdir d; (while :; do mkdir -p d/$RANDOM/a; done) > /dev/null 2>&1 &")
  start = time.monotonic()
  for _ in range(20):
    try:
      isolated.remove("d", timeout=0.2)
    except SandboxError:
      pass
  assert time.monotonic() - start < 60
  assert isolated.alive()


def _raw(sandbox):
  raw = socket.socket(socket.AF_UNIX)
  raw.settimeout(20)
  raw.connect(str(sandbox._home / "sock"))
  return raw


def _exchange(raw, request):
  """Sends a request; returns errno and data of the answer, or None where the connection closed."""
  try:
    raw.sendall(request)
    header = raw.recv(24, socket.MSG_WAITALL)
    if len(header) < 24:
      return None
    errno, _, _, length, _ = struct.unpack("<iiIIQ", header)
    return errno, raw.recv(length, socket.MSG_WAITALL) if length else b""
  except (ConnectionError, BrokenPipeError):
    return None


OPS = (4, 20, 21, 22, 23, 24, 25, 26)


def _well_framed(rng):
  """A request with true lengths and otherwise anything."""
  name = rng.choice(
    [b"f", b"d/f", b"/work/f", b"/tmp/x", b"..", b"a\0b", b"", b"l/x", rng.randbytes(9)]
  )
  number = rng.choice([0, 1, 5, 1 << 31, 1 << 62, (1 << 64) - 1, rng.getrandbits(64)])
  token = rng.choice([b"0" * 32, rng.randbytes(32), b"a" * 31 + b"\0"])
  flags, length = rng.choice([0, 1, 3, 4, 5, 7, 8, rng.getrandbits(32)]), rng.getrandbits(32)
  data = struct.pack("<IIQq32s", flags, length, number, rng.getrandbits(63), token)
  data = rng.choice([data, data + rng.randbytes(50), data[: rng.randrange(56)]])
  head = (rng.choice(OPS), rng.randrange(200), rng.getrandbits(12), rng.randrange(2))
  return struct.pack("<6I", *head, len(name), len(data)) + name + data


def test_rubbish_on_the_wire(isolated):
  """Rocklet ends such a connection at most; every other one goes on."""
  rng = random.Random(5)
  answers = 0
  for _ in range(60):
    with _raw(isolated) as raw:
      for _ in range(rng.randrange(1, 20)):
        answer = _exchange(raw, _well_framed(rng))
        if answer is None:
          break
        answers += 1
  for _ in range(60):
    with _raw(isolated) as raw:
      raw.sendall(struct.pack("<I", rng.choice(OPS)) + rng.randbytes(rng.randrange(300)))
      raw.shutdown(socket.SHUT_WR)
      try:
        while raw.recv(65536):
          pass
      except ConnectionResetError:
        pass
  assert answers > 50
  isolated.write_file("after", b"x")
  assert isolated.read_file("after") == b"x"
  assert isolated.run("echo here").output == "here\n"
