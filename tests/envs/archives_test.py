"""Archives in and out: what is kept, and every trick that is refused before anything is written."""

import gzip
import hashlib
import io
import lzma
import tarfile

import hypothesis
import pytest
from hypothesis import strategies as st

from rome.envs import archives
from rome.envs.archives import ArchiveError, download_archive, upload_archive
from rome.envs.channel import FIXED_MTIME_NS
from rome.envs.common import SandboxError

MIB = 1 << 20


def _member(name, data=b"", kind=tarfile.REGTYPE, **fields):
  info = tarfile.TarInfo(name)
  info.type, info.size, info.mode = kind, len(data), 0o644
  for field, value in fields.items():
    setattr(info, field, value)
  return info, data


def _tar(*members, form=tarfile.PAX_FORMAT, **options):
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w", format=form, **options) as archive:
    for info, data in members:
      archive.addfile(info, io.BytesIO(data))
  return out.getvalue()


def _raw_header(name, size, kind=b"0", linkname=b""):
  """A header block with a true checksum and anything else."""
  block = bytearray(512)
  block[: len(name)] = name
  block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
  block[124:136] = b"%011o\0" % size if isinstance(size, int) else size
  block[136:148], block[148:156], block[156:157] = b"%011o\0" % 0, b" " * 8, kind
  block[157 : 157 + len(linkname)] = linkname
  block[257:265] = b"ustar\x0000"
  block[148:156] = b"%06o\0 " % sum(block)
  return bytes(block)


def _block(data):
  return data + bytes(-len(data) % 512)


def _pax(records, kind=b"x"):
  text = b""
  for key, value in records.items():
    line = b" %s=%s\n" % (key, value)
    size = len(line) + len(str(len(line)))
    size += len(str(size)) - len(str(len(line)))
    text += b"%d%s" % (size, line)
  return _raw_header(b"pax", len(text), kind) + _block(text)


END = bytes(1024)
GOOD = _raw_header(b"good", 1) + _block(b"x")


@pytest.fixture
def box(sandboxes):
  return sandboxes("bubblewrap")


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_an_archive_is_unpacked(box, pack, form):
  big, deep = bytes(range(256)) * 8192, "/".join(["d" * 90] * 4)
  archive = _tar(
    _member("./", kind=tarfile.DIRTYPE, mode=0o700),
    _member("a/empty", kind=tarfile.DIRTYPE, mode=0o2750),
    _member("a/run", b"#!/bin/sh\n", mode=0o4755, uid=7, uname="x", mtime=1_000_000_000),
    _member("./a", kind=tarfile.DIRTYPE, mode=0o755),
    _member("big", big, mode=0o600),
    _member("n\u00e4me\n", b"1"),
    _member(deep, b"2"),
    form=form,
  )
  done = upload_archive(box, io.BytesIO(pack(archive)), "t")
  assert (done.files, done.bytes) == (4, 10 + len(big) + 2)
  assert box.run("stat -c '%a %u %Y %n' t/a/run t/a/empty").output.splitlines() == [
    "755 1000 1000000000 t/a/run",
    "750 1000 1577836800 t/a/empty",
  ]
  assert box.run("sha256sum < t/big").output.split()[0] == hashlib.sha256(big).hexdigest()
  assert box.read_file("t/n\u00e4me\n") == b"1" and box.read_file(f"t/{deep}") == b"2"


def test_an_archive_there_and_back(isolated, tmp_path):
  isolated.run(
    "mkdir -p t/b/e; echo 1 > t/b/f; echo 2 > $'t/\\377\\n'; ln -s f t/b/l; chmod 600 t/b/f"
  )
  isolated.run("head -c 3000000 /dev/urandom > t/z; touch -d @1234567890 t/z")
  first, second = io.BytesIO(), io.BytesIO()
  done = download_archive(isolated, "t", first)
  assert download_archive(isolated, "t", second) == done
  assert first.getvalue() == second.getvalue()
  assert done.skipped == (("b/l", "a symbolic link"),)
  assert isolated.download("t", tmp_path / "t").sha256 == done.sha256
  first.seek(0)
  assert upload_archive(isolated, first, "u").sha256 == done.sha256
  first.seek(0)
  with tarfile.open(fileobj=first) as archive:
    members = archive.getmembers()
  assert [m.name for m in members] == ["b", "b/e", "b/f", "z", "\udcff\n"]
  assert members[3].mtime == 1234567890 and {m.uname + m.gname for m in members} == {""}
  assert isolated.lstat("u/z").mtime_ns == 1234567890 * 10**9
  single = io.BytesIO()
  assert download_archive(isolated, "t/b/f", single).sha256 == hashlib.sha256(b"1\n").hexdigest()
  single.seek(0)
  assert tarfile.open(fileobj=single).getnames() == ["f"]
  for limits in ({"max_files": 3}, {"max_bytes": 2_999_999}):
    with pytest.raises(SandboxError, match="more than 3 files|larger than the limit"):
      download_archive(isolated, "t", io.BytesIO(), **limits)


HOSTILE = {
  "absolute": (_raw_header(b"/tmp/evil", 1) + _block(b"x"), "'/tmp/evil' leads out"),
  "up": (_raw_header(b"../evil", 1) + _block(b"x"), "'../evil' leads out"),
  "up inside": (_raw_header(b"a/../../evil", 1) + _block(b"x"), "'a/../../evil' leads out"),
  "up as directory": (_raw_header(b"a/..", 0, b"5"), "'a/..' leads out"),
  "symlink": (_raw_header(b"evil", 0, b"2", b"/etc"), "'evil' is a symbolic link"),
  "hard link": (_raw_header(b"evil", 0, b"1", b"/etc/passwd"), "'evil' is a hard link"),
  "device": (_raw_header(b"evil", 0, b"3"), "'evil' is a device"),
  "block device": (_raw_header(b"evil", 0, b"4"), "'evil' is a device"),
  "fifo": (_raw_header(b"evil", 0, b"6"), "'evil' is a fifo"),
  "contiguous": (_raw_header(b"evil", 0, b"7"), "'evil' is of the unknown type"),
  "unknown": (_raw_header(b"evil", 0, b"Q"), "'evil' is of the unknown type"),
  "gnu sparse": (_raw_header(b"evil", 1, b"S") + _block(b"x"), "'evil' is a sparse file"),
  "twice": (GOOD, "'good' appears twice"),
  "twice, otherwise spelt": (_raw_header(b".//good", 1) + _block(b"x"), "good' appears twice"),
  "below a file": (_raw_header(b"good/evil", 1) + _block(b"x"), "below 'good', which is a file"),
  "the top": (_raw_header(b"./.", 1) + _block(b"x"), "is the archive's top"),
  "long part": (_pax({b"path": b"x" * 300}) + _raw_header(b"e", 0), "too long a name"),
  "long name": (_pax({b"path": b"x/" * 1600}) + _raw_header(b"e", 0), "too long a name"),
  "deep": (_pax({b"path": b"x/" * 300}) + _raw_header(b"e", 0), "deeper than 256"),
  "size bomb": (_raw_header(b"evil", 1 << 32), "'evil' takes the archive above its limit"),
  "negative size": (_raw_header(b"evil", b"\xff" * 12), "'evil' has a negative size"),
  "huge pax header": (_raw_header(b"evil", 1 << 30, b"x"), "extended header of 1073741824"),
  "huge global header": (_raw_header(b"evil", 1 << 30, b"g"), "extended header of"),
  "huge GNU name": (_raw_header(b"evil", 1 << 30, b"L"), "extended header of"),
  "pax path": (_pax({b"path": b"evil"}) + GOOD, "'evil' is called 'good' by its plain header"),
  "pax path up": (_pax({b"path": b"../evil"}) + GOOD, "'../evil' leads out"),
  "GNU name": (
    _raw_header(b"././@LongLink", 5, b"L") + _block(b"evil\0") + _raw_header(b"harmless", 0),
    "'evil' is called 'harmless'",
  ),
  "pax size": (_pax({b"size": b"600"}) + GOOD, "'good' has two sizes, 1 and 600"),
  "pax negative size": (_pax({b"size": b"-600"}) + GOOD, "two sizes|cannot|damaged|backwards"),
  "pax path for all": (_pax({b"path": b"x" * 120}, b"g") + GOOD, "header for all members"),
  "pax sparse": (
    _pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.name": b"evil",
          b"GNU.sparse.realsize": b"99999999999"}) + _raw_header(b"evil", 512) + _block(b"9" * 512),
    "is a sparse file",
  ),
  "old pax sparse": (
    _pax({b"GNU.sparse.map": b"0,1,99999999,1", b"GNU.sparse.size": b"100000000"})
    + _raw_header(b"evil", 2) + _block(b"xx"),
    "is a sparse file",
  ),
  "pax time": (_pax({b"mtime": b"nan"}) + _raw_header(b"evil", 0), "impossible time"),
  "pax far time": (_pax({b"mtime": b"1e300"}) + _raw_header(b"evil", 0), "impossible time"),
  "pax NUL": (_pax({b"path": b"e\0" + b"x" * 120}) + _raw_header(b"e", 0), "leads out|damaged"),
  "directory with content": (_raw_header(b"evil", 512, b"5") + _block(b"x"), "impossible size"),
  "damaged header": (b"\1" * 512, "damaged header"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_tricks_are_refused(box, name):
  member, why = HOSTILE[name]
  box.write_file("/tmp/keep", b"", owner="root")
  with pytest.raises(ArchiveError, match=why):
    upload_archive(box, io.BytesIO(GOOD + member + END), "t", max_bytes=1 << 31)
  assert box.run("cd t; find . | sort; cd /; ls /tmp").output.split() == [".", "./good", "keep"]


def test_what_is_no_whole_archive(box):
  whole = _tar(_member("a", b"x" * 3000), _member("b", b"y"))
  cases = [b"", b"x", whole[:300], whole[:512], whole[:2000], whole[:4096], b"\x1f\x8b" + whole]
  cases += [gzip.compress(whole)[:-20], lzma.compress(whole)[:-20], lzma.compress(whole)[:9]]
  cases += [b"BZh91AY", b"PK\3\4" + whole, b"\x28\xb5\x2f\xfd" + whole]
  cases += [whole + whole, gzip.compress(whole)[:-8] + bytes(8), gzip.compress(whole) + b"x"]
  for data in cases:
    with pytest.raises(ArchiveError, match="archive"):
      upload_archive(box, io.BytesIO(data), "t")
  assert upload_archive(box, io.BytesIO(gzip.compress(whole) + bytes(512)), "u").files == 2


def test_limits(box):
  whole = _tar(_member("a", b"x" * 3000), _member("b", b"y"), _member("c/d/e", b"z"))
  for limits, why in (
    ({"max_files": 2}, "'c/d/e' is one more than the limit of 2"),
    ({"max_files": 4}, "'c/d/e' takes the archive above 4 names"),
    ({"max_bytes": 3001}, "'c/d/e' takes the archive above its limit by 1 bytes"),
  ):
    with pytest.raises(ArchiveError, match=why):
      upload_archive(box, io.BytesIO(whole), "t", **limits)
  assert upload_archive(box, io.BytesIO(whole), "u", max_files=5, max_bytes=3002).files == 3


@pytest.mark.parametrize("pack", [gzip.compress, lambda data: lzma.compress(data, preset=0)])
def test_compression_bombs(box, pack):
  bomb = pack(_tar(_member("bomb", bytes(18 * MIB))))
  with pytest.raises(ArchiveError, match="compressed more than 200"):
    upload_archive(box, io.BytesIO(bomb), "t")
  assert box.run("ls -A t/bomb").exit_code != 0


def test_a_link_in_the_sandbox_is_not_followed(box):
  box.write_file("/tmp/root/keep", b"", mode=0o600, owner="root")
  box.run("mkdir t; ln -s /tmp/root t/d; ln -s /tmp/root l")
  archive = _tar(_member("d/evil", b"x"))
  for remote in ("t", "l"):
    with pytest.raises(SandboxError, match=f"'{remote}"):
      upload_archive(box, io.BytesIO(archive), remote)
  assert box.run("ls -A /tmp/root").output == "keep\n"


NAMES = st.text(st.sampled_from("ab./\\\0\n\udcff\u00e9~ -*"), max_size=12) | st.sampled_from(
  ["..", "../x", "/x", "a/../../x", "./..", "a/b/c", "x" * 300, "a//b", ".rome-0"]
)
KINDS = st.sampled_from([bytes([k]) for k in b"0123456757\0LKxgSDVX"])


@st.composite
def _hostile_archives(draw):
  """Members of any kind and name, in any format, then perhaps some bytes changed."""
  members = []
  for _ in range(draw(st.integers(0, 5))):
    data = draw(st.binary(max_size=600))
    records = draw(st.dictionaries(
      st.sampled_from(["path", "linkpath", "size", "mtime", "GNU.sparse.map", "GNU.sparse.major",
                       "hdrcharset", "comment"]),
      st.text("0123456789-.,e/ax=\n ", max_size=20), max_size=2))  # fmt: skip
    info, data = _member(
      draw(NAMES), data, draw(KINDS), linkname=draw(NAMES), mode=draw(st.integers(0, 0o7777)),
      mtime=draw(st.integers(0, 2**33)), pax_headers=records,
    )  # fmt: skip
    members.append((info, data))
  form = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]))
  try:
    data = bytearray(_tar(*members, form=form, errors="surrogateescape"))
  except (ValueError, UnicodeError):
    hypothesis.reject()
  for _ in range(draw(st.integers(0, 4))):
    data[draw(st.integers(0, min(len(data) - 1, 4096)))] = draw(st.integers(0, 255))
  return draw(st.sampled_from([bytes, gzip.compress]))(bytes(data))


@hypothesis.given(_hostile_archives())
@hypothesis.settings(
  max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
def test_no_archive_writes_elsewhere(box, archive):
  """Whatever it holds: unpacked below the top or refused with an ArchiveError, nothing else."""
  box.run("rm -rf t; mkdir t")
  try:
    done = upload_archive(box, io.BytesIO(archive), "t", max_bytes=4 * MIB)
  except SandboxError:
    done = None
  # A directory may say that its owner cannot look into it; all of it is the agent's.
  look = "ls -A /tmp /work; find t ! -type f ! -type d; find t -perm /7000"
  shown = box.run(f"chmod -R u+rwx t; {look}").output
  assert shown == "/tmp:\n\n/work:\nt\n"
  if done is not None:
    found = box.run("find t -type f -print0 | tr -dc '\\0' | wc -c").output
    assert int(found) == done.files


def test_times_are_kept_to_the_millisecond(box):
  upload_archive(box, io.BytesIO(_tar(_member("f", mtime=1.25), _member("g", mtime=-5.0))), "t")
  assert box.lstat("t/f").mtime_ns == 1_250_000_000
  assert box.lstat("t/g").mtime_ns == -5_000_000_000
  assert box.lstat("t").mtime_ns == FIXED_MTIME_NS
  assert archives.ArchiveError.__mro__[1] is SandboxError
