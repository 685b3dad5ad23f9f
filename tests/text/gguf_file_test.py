"""Reading the container of a GGUF file: what the reference writer writes, and damaged files."""

import struct

import gguf
import numpy as np
import pytest

from rome.text.gguf_file import Tensor, read_gguf


@pytest.fixture(name="file")
def _file(tmp_path):
  path = tmp_path / "a.gguf"
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_uint32("a.count", 7)
  writer.add_float32("a.rate", 0.5)
  writer.add_bool("a.flag", True)
  writer.add_string("a.name", "größe")
  writer.add_array("a.tokens", ["x", "", "\n"])
  writer.add_array("a.types", [3, -1, 1])
  writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
  writer.add_tensor("u", np.ones(5, np.float16))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def test_reads_what_the_reference_writes(file):
  got = read_gguf(file)
  assert got.metadata == {
    "general.architecture": "llama",
    "a.count": 7,
    "a.rate": 0.5,
    "a.flag": True,
    "a.name": "größe",
    "a.tokens": ["x", "", "\n"],
    "a.types": [3, -1, 1],
  }
  start = got.tensors["t"].offset
  assert start % 32 == 0
  assert got.tensors == {"t": Tensor((2, 3), 0, start), "u": Tensor((5,), 1, start + 32)}
  data = file.read_bytes()
  assert np.frombuffer(data, "<f4", 6, start).tolist() == [0, 1, 2, 3, 4, 5]


def test_every_truncation_of_the_header_is_a_named_error(file):
  data, end = file.read_bytes(), read_gguf(file).tensors["t"].offset - 31
  for size in range(end):
    file.write_bytes(data[:size])
    with pytest.raises(ValueError, match="a.gguf: no usable GGUF file"):
      read_gguf(file)


def header(*keys: bytes, tensors: int = 0, version: int = 3) -> bytes:
  return b"GGUF" + struct.pack("<IQQ", version, tensors, len(keys)) + b"".join(keys)


def key(name: bytes, kind: int, value: bytes) -> bytes:
  return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


HUGE = struct.pack("<Q", 1 << 60)


@pytest.mark.parametrize(
  "data, message",
  [
    (b"", "empty"),
    (b"PK\x03\x04" + bytes(30), "does not begin with GGUF"),
    (header(version=1), "version 1 is not supported"),
    (header(version=0x03000000), "version 50331648 is not supported"),
    (header(key(b"a", 4, b"\1\0\0\0"), key(b"a", 4, b"\1\0\0\0")), "duplicate key a"),
    (header(key(b"a", 13, b"")), "unknown metadata type 13"),
    (header(key(b"\xff", 4, bytes(4))), "invalid start byte"),
    # Counts far beyond the file are refused before anything is allocated.
    (header(key(b"a", 8, HUGE)), "truncated"),
    (header(key(b"a", 9, b"\4\0\0\0" + HUGE)), "truncated"),
    (header(key(b"a", 9, b"\x08\0\0\0" + HUGE)), "truncated"),
    (header(key(b"a", 9, b"\x09\0\0\0" + HUGE)), "arrays of metadata type 9"),
    (header(tensors=1 << 60), "truncated"),
    (header(key(b"general.alignment", 4, b"\3\0\0\0")), "general.alignment must be a power of two"),
    (
      header(tensors=1) + b"\1\0\0\0\0\0\0\0t\x05\0\0\0" + bytes(52),
      "tensor t has 5 dimensions",
    ),
  ],
)
def test_damaged_files_are_named_errors(data, message, tmp_path):
  path = tmp_path / "a.gguf"
  path.write_bytes(data)
  with pytest.raises(ValueError, match=message):
    read_gguf(path)


def test_a_missing_file_is_a_named_error(tmp_path):
  with pytest.raises(ValueError, match="none.gguf: no usable GGUF file: .*No such file"):
    read_gguf(tmp_path / "none.gguf")
