"""The bounded log, its file, and rocklet's records."""

import json
import struct
import time

from rome.envs.network import attempts
from rome.envs.network.attempts import AttemptLog, EgressLog


def record(call, family, port, address=b"", kind=0, first=5_000_000_000, count=1):
  return struct.pack("<qqI4H16s4x", first, first, count, call, family, port, kind, address)


def test_order_labels_and_clearing():
  log = AttemptLog("box")
  log.episode = "one"
  first = log.begin("http", "a:80", True)
  first.sent = 5
  log.episode = "two"
  log.begin("dns", "b", False, "not in the allow-list")
  log.add_direct(record(1, 2, 443, bytes([192, 0, 2, 1])), 2, lambda host, port: None)
  found = log.attempts()
  assert [(a.destination, a.episode) for a in found] == [
    ("192.0.2.1:443", "two"), ("a:80", "one"), ("b", "two"),
  ]  # fmt: skip
  assert found[0].time == 5.0 and found[1].sent == 5 and log.lost == 2
  log.clear()
  assert log.attempts() == [] and log.lost == 0


def test_the_first_and_the_last_are_kept(monkeypatch):
  monkeypatch.setattr(attempts, "KEEP", 10)
  log = AttemptLog("box")
  for i in range(100):
    log.begin("dns", str(i))
  assert [a.destination for a in log.attempts()] == [str(i) for i in (*range(5), *range(95, 100))]
  assert log.lost == 90


def test_records_of_rocklet():
  data = record(2, 10, 53, bytes.fromhex("20010db8000000000000000000000001"), count=7)
  data += record(3, 40, 0, kind=1) + record(1, 0, 0) + record(3, 999, 1, kind=9)
  data += record(1, 2, 80, bytes([127, 77, 0, 1])) + record(1, 2, 81, bytes([127, 77, 0, 1]))
  log = AttemptLog("box")
  log.add_direct(data, 0, lambda host, port: None if port == 80 else f"known.example:{port}")
  assert [(a.destination, a.reason, a.count) for a in log.attempts()] == [
    ("[2001:db8::1]:53", "send: no route", 7),
    ("socket(family=AF_VSOCK, type=SOCK_STREAM, protocol=0)", "socket: family or type refused", 1),
    ("unknown", "connect: no route", 1),
    ("socket(family=999, type=9, protocol=1)", "socket: family or type refused", 1),
    ("known.example:81", "not in the allow-list", 1),
  ]


def test_the_file_is_flushed_and_bounded(tmp_path):
  path = tmp_path / "egress.jsonl"
  log = AttemptLog("box")
  log.file = EgressLog(path, max_bytes=1000)
  entry = log.begin("http", "a\nb\x1b[2J" + "x" * 1000, True)
  assert path.read_text() == ""  # it goes on
  entry.received = 9
  log.end(entry)
  line = json.loads(path.read_text())
  assert line["sandbox"] == "box" and line["received"] == 9 and abs(line["time"] - time.time()) < 60
  assert line["destination"].startswith("a\\nb\\x1b[2J") and len(line["destination"]) < 400
  for _ in range(10):
    log.end(entry)
  lines = path.read_text().splitlines()
  assert json.loads(lines[-1]) == {"sandbox": "box", "full": True} and len(lines) < 5
  log.file.close()
  log.end(entry)
  assert path.read_text().splitlines() == lines
