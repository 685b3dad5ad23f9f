"""Servers on this machine's 127.0.0.1 that play the allowed world outside."""

import contextlib
import http.server
import socket
import socketserver
import threading


class _Pages(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def do_GET(self):
    if self.path == "/chunked":
      self.send_response(200)
      self.send_header("Transfer-Encoding", "chunked")
      self.end_headers()
      self.wfile.write(b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n")
      return
    self._answer(f"{self.command} {self.path}\n{self.headers}".encode())

  do_HEAD = do_DELETE = do_GET

  def do_POST(self):
    if self.headers.get("Transfer-Encoding") == "chunked":
      body = b""
      while size := int(self.rfile.readline(), 16):
        body += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
    else:
      body = self.rfile.read(int(self.headers["Content-Length"]))
    self._answer(b"posted %d %r\n" % (len(body), body[:10]))

  def _answer(self, body):
    self.send_response(200)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def log_message(self, *args):
    pass


class _Echo(socketserver.BaseRequestHandler):
  """Says back what it hears; after the other's end it says "bye" and ends, too."""

  def handle(self):
    with contextlib.suppress(OSError):
      while data := self.request.recv(1 << 18):
        self.request.sendall(data)
      self.request.sendall(b"bye")


class _Server(socketserver.ThreadingTCPServer):
  daemon_threads = True
  request_queue_size = 512

  def handle_error(self, request, client_address):
    pass  # clients that hang up are part of the tests


@contextlib.contextmanager
def _serving(handler):
  with _Server(("127.0.0.1", 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()


def pages():
  """A web server. Yields its port."""
  return _serving(_Pages)


def echo():
  """An echo server. Yields its port."""
  return _serving(_Echo)


def receive_all(connection):
  """Reads to the end; a reset is an end, too."""
  data = b""
  with contextlib.suppress(ConnectionResetError):
    while more := connection.recv(1 << 16):
      data += more
  return data


def ask(port, *parts, timeout=20.0):
  """Sends bytes to a port of this machine, says that no more will come, and reads all."""
  with socket.create_connection(("127.0.0.1", port), timeout) as connection:
    for part in parts:
      connection.sendall(part)
    connection.shutdown(socket.SHUT_WR)
    return receive_all(connection)
