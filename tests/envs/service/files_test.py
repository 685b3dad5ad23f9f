"""Files over HTTP: whole, in parts, broken off and resumed."""

import hashlib
import os
import socket
import time

import pytest

from rome.envs import Limits, SandboxError
from rome.envs.remote import RemoteError, UnknownRemote
from tests.envs.service.conftest import ALICE

BLOB = bytes(range(256)) * 12_000  # 3 MB


@pytest.mark.parametrize("data", [b"", b"hi\n\0\xff", BLOB])
def test_what_is_written_is_read(sandbox, data):
  sandbox.write_file("deep/er/file", data, mode=0o640)
  assert sandbox.read_file("deep/er/file") == data
  digest = hashlib.sha256(data).hexdigest()
  assert sandbox.run("sha256sum deep/er/file; stat -c %a deep/er/file").output.split()[0::2] == [
    digest,
    "640",
  ]


def test_parts_of_a_file(service, sandbox):
  sandbox.write_file("blob", BLOB)
  base = f"/v1/sandboxes/{sandbox.id}/files"
  with service.http() as http:
    for offset, length in ((0, 10), (1 << 20, 5), (len(BLOB) - 3, 100), (len(BLOB), 7), (5, 0)):
      response = http.get(base, params={"path": "blob", "offset": offset, "length": length})
      assert response.content == BLOB[offset : offset + length]
      assert response.headers["X-File-Size"] == str(len(BLOB))
      digest = hashlib.sha256(response.content).hexdigest()
      assert response.headers["X-Checksum-SHA256"] == digest
    assert http.get(base, params={"path": "blob", "offset": len(BLOB) + 1}).status_code == 416
    whole = http.get(base, params={"path": "blob", "checksum": "true"})
    assert whole.headers["X-Checksum-SHA256"] == hashlib.sha256(BLOB).hexdigest()
    head = http.head(base, params={"path": "blob"})
    assert head.headers["X-File-Size"] == str(len(BLOB)) and "X-Upload-Offset" not in head.headers


def test_an_upload_through_a_broken_connection_goes_on_where_it_stood(service, sandbox):
  path = f"/v1/sandboxes/{sandbox.id}/files"
  host, port = service.url.removeprefix("http://").split(":")
  with socket.create_connection((host, int(port))) as raw:
    raw.sendall(
      f"PUT {path}?path=big HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n"
      f"Content-Length: {len(BLOB)}\r\n\r\n".encode()
      + BLOB[:1_500_000]
    )
  with service.http() as http:
    for _ in range(600):  # until the service has seen the hang-up
      found = http.head(path, params={"path": "big"})
      offset = int(found.headers.get("X-Upload-Offset", 0))
      if offset == 1_500_000:
        break
      time.sleep(0.05)
    assert offset == 1_500_000 and "X-File-Size" not in found.headers
    query = {"path": "big", "offset": 17}
    wrong = http.put(path, params=query, content=BLOB[17:])
    assert wrong.status_code == 409 and wrong.json()["error"]["code"] == "wrong_offset"
    rest = http.put(
      path,
      params={"path": "big", "offset": offset},
      content=BLOB[offset:],
      headers={"X-Checksum-SHA256": hashlib.sha256(BLOB).hexdigest()},
    )
    assert rest.status_code == 201
    assert rest.json()["size"] == len(BLOB)
    again = http.put(path, params={"path": "big", "offset": offset}, content=b"")
    assert again.json()["error"]["code"] == "no_upload"
  assert sandbox.read_file("big") == BLOB


def test_a_wrong_digest_leaves_nothing(service, sandbox):
  with service.http() as http:
    response = http.put(
      f"/v1/sandboxes/{sandbox.id}/files",
      params={"path": "x"},
      content=b"data",
      headers={"X-Checksum-SHA256": "0" * 64},
    )
  assert response.status_code == 422 and "sha256" in response.json()["error"]["message"]
  assert sandbox.run("ls -A").output == ""


def test_a_full_disk_is_told_and_the_sandbox_lives(client):
  with client.create(limits=Limits(disk_mb=2)) as small:
    with pytest.raises(RemoteError, match="No space left") as error:
      small.write_file("big", b"x" * (8 << 20))
    assert error.value.status == 413
    assert small.run("ls -A").output == ""


@pytest.mark.parametrize(
  "path, status", [("../x", 422), ("a/../../b", 422), ("/", 422), ("missing", 404), (".", 422)]
)
def test_paths_that_lead_nowhere(service, sandbox, path, status):
  with service.http() as http:
    response = http.get(f"/v1/sandboxes/{sandbox.id}/files", params={"path": path})
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"code", "message", "mend"}


def test_links_of_the_agent_lead_nowhere(sandbox):
  sandbox.run("ln -s /etc/passwd link; mkdir d; ln -s / d/root")
  for path in ("link", "d/root/etc/passwd"):
    with pytest.raises(SandboxError):
      sandbox.read_file(path)
    with pytest.raises(SandboxError):
      sandbox.write_file(path + "/x", b"")


def test_trees_go_there_and_back(sandbox, tmp_path):
  source = tmp_path / "source"
  (source / "sub" / "empty").mkdir(parents=True)
  (source / "a.txt").write_bytes(b"a")
  (source / "sub" / "b").write_bytes(BLOB)
  (source / "sub" / "b").chmod(0o600)
  there = sandbox.upload(source, "tree")
  back = sandbox.download("tree", tmp_path / "back")
  assert there.files == back.files == 2 and there.sha256 == back.sha256
  assert (tmp_path / "back" / "sub" / "b").read_bytes() == BLOB
  assert (tmp_path / "back" / "sub" / "empty").is_dir()
  assert os.stat(tmp_path / "back" / "sub" / "b").st_mode & 0o777 == 0o600
  with pytest.raises(FileExistsError):
    sandbox.download("tree", tmp_path / "back")
  one = sandbox.download("tree/a.txt", tmp_path / "one")
  assert (tmp_path / "one").read_bytes() == b"a" and one.sha256 == hashlib.sha256(b"a").hexdigest()


def test_a_hostile_tree_is_left_out_and_told(sandbox, tmp_path):
  sandbox.run("mkdir t; cd t; ln -s /etc link; mkfifo pipe; touch $'bad\\xff'; echo ok > fine")
  back = sandbox.download("t", tmp_path / "t")
  assert sorted(os.listdir(tmp_path / "t")) == ["fine"]
  assert sorted(path for path, _ in back.skipped)[1:] == ["link", "pipe"]
  with pytest.raises(SandboxError, match="more than"):
    sandbox.download("t", tmp_path / "u", max_files=2)
  with pytest.raises(SandboxError, match="more than"):
    sandbox.download("t", tmp_path / "u", max_bytes=2)
  assert not (tmp_path / "u").exists() and not list(tmp_path.glob(".download*"))


def test_removing(sandbox):
  sandbox.write_file("d/e/f", b"x")
  sandbox.remove("d")
  assert sandbox.run("ls").output == ""
  with pytest.raises(UnknownRemote):
    sandbox.remove("d")


def test_an_upload_in_parts_can_be_dropped_or_finished(sandbox):
  with sandbox.open_upload("x") as upload:
    upload.write(b"one")
  assert sandbox.run("ls -A").output == ""
  with sandbox.open_upload("x", mode=0o600) as upload:
    upload.write(b"one")
    upload.resume()
    upload.write(b"two")
    assert upload.offset == 6
    upload.finish()
  assert sandbox.run("cat x; stat -c %a x").output == "onetwo600\n"
  download = sandbox.open_download("x")
  assert (download.size, download.read(2, 3)) == (6, b"etw")
