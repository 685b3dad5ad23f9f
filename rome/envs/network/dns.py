"""A DNS server's answers by policy alone (RFC 1035): no question is ever passed on.

The answer to an allowed name is the loopback address at which a forwarder for it listens. One
question, of type A, AAAA or any other, is all that is read of a message; this is less code than
the use of a DNS library, and its input is an agent's.
"""

import socket
import struct

_HEADER = struct.Struct(">6H")  # id, flags, counts of questions, answers, authorities, additional
_A, _ANY, _IN = 1, 255, 1
_QR, _OPCODE, _AA, _RD, _RA = 0x8000, 0x7800, 0x0400, 0x0100, 0x0080
NO_ERROR, FORMAT_ERROR, NO_NAME, NOT_IMPLEMENTED = 0, 1, 3, 4
_TTL = 30  # seconds
MAX_MESSAGE = 512


class Question:
  """What a message asks.

  Attributes:
    id, flags: of the header.
    name: as text, of any bytes; '' if it cannot be read.
    kind: the record type.
    code: NO_ERROR, or why it cannot be answered.
    raw: the question as sent, which the answer repeats.
  """

  def __init__(self, message: bytes):
    """Reads a message. Raises ValueError if there is not even a header of a question."""
    if len(message) < _HEADER.size:
      raise ValueError("shorter than a header")
    self.id, self.flags, questions, *_ = _HEADER.unpack_from(message)
    if self.flags & _QR:
      raise ValueError("an answer, no question")
    self.name, self.kind, self.raw, self.code = "", 0, b"", FORMAT_ERROR
    if self.flags & _OPCODE:
      self.code = NOT_IMPLEMENTED
    elif questions == 1:
      self._read(message)

  def _read(self, message: bytes) -> None:
    labels, at = [], _HEADER.size
    while at < len(message) and 0 < message[at] < 64:  # no compression: nothing to point at
      labels.append(message[at + 1 : at + 1 + message[at]])
      at += 1 + message[at]
    if at + 5 > len(message) or message[at] or at - _HEADER.size > 254:
      return
    self.kind, kind_class = struct.unpack_from(">HH", message, at + 1)
    self.name = ".".join(label.decode("ascii", "backslashreplace") for label in labels) or "."
    self.raw = message[_HEADER.size : at + 5]
    self.code = NO_ERROR if kind_class == _IN else NOT_IMPLEMENTED

  def answer(self, code: int, address: str | None = None) -> bytes:
    """The message that answers: an error, an IPv4 address, or that there is no such record."""
    records = b""
    if code == NO_ERROR and address and self.kind in (_A, _ANY):
      packed = socket.inet_aton(address)
      records = struct.pack(">HHHIH", 0xC00C, _A, _IN, _TTL, len(packed)) + packed
    flags = _QR | _AA | _RA | (self.flags & (_RD | _OPCODE)) | code
    counts = (bool(self.raw), bool(records), 0, 0)
    return _HEADER.pack(self.id, flags, *counts) + self.raw + records
