"""The report of a run under way, served on this machine and kept up to date.

The page has no script here either: a line in its head makes the browser ask again every few
seconds, until the run has finished. It is drawn again only when a file of the run has changed.

Left out: pushing changes, which takes a script; serving to other machines (ssh -L does it).
"""

import http.server
import pathlib
import sys
import threading
from collections.abc import Callable

from rome.train import report_page as page

REFRESH_SECONDS = 5
_FILES = (
  *("metrics.jsonl", "episodes.jsonl", "timeline.json"),
  *("summary.json", "config.json", "run.json"),
)
_TITLE = "A run of rome"


class LiveReport(http.server.ThreadingHTTPServer):
  """Serves one page, "/", to this machine; `serve_forever` runs it. A context manager.

  While the files cannot be drawn (the run is about to write its first row, or a file is half
  written) the last page that could be is served, or one line that says what is missing.

  Args:
    workdir: of the run.
    draw: makes the page from its files.
    expected: what `draw` raises where it cannot.
    port: 0 takes a free one.

  Raises:
    OSError: the port is taken.
    OverflowError: it is no port.
  """

  daemon_threads = True

  def __init__(
    self,
    workdir: pathlib.Path,
    draw: Callable[[], str],
    expected: type[Exception],
    port: int = 0,
  ):
    self._workdir, self._draw, self._expected = workdir, draw, expected
    self._lock = threading.Lock()
    self._seen: object = None
    self._page = b""
    super().__init__(("127.0.0.1", port), _Handler)
    self.url = f"http://127.0.0.1:{self.server_port}/"

  def page(self) -> tuple[int, bytes]:
    """The status and the page as the files stand."""
    with self._lock:
      seen = [_stamp(self._workdir / name) for name in _FILES]
      if not self._page or seen != self._seen:
        try:
          self._page, self._seen = self._draw().encode(), seen
        except self._expected as error:
          if not self._page:
            return 503, _waiting(str(error))
      return 200, self._page

  def handle_error(self, request: object, client_address: object) -> None:
    """A browser that hangs up is no news; anything else is."""
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(http.server.BaseHTTPRequestHandler):
  server: LiveReport
  timeout = 30

  def do_GET(self) -> None:
    # A name that a foreign page had pointed at this machine would let it read the run.
    hosts = [f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")]
    if self.headers.get("Host") not in hosts:
      status, body = 403, b"Ask for this page by 127.0.0.1 or localhost.\n"
    elif self.path != "/":
      status, body = 404, b"There is one page here, /.\n"
    else:
      status, body = self.server.page()
    kind = "html" if body.startswith(b"<!doctype") else "plain"
    self.send_response(status)
    self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
    self.send_header("Content-Length", str(len(body)))
    self.send_header("Cache-Control", "no-store")
    self.send_header("Content-Security-Policy", page.POLICY)
    self.send_header("X-Content-Type-Options", "nosniff")
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, format: str, *args: object) -> None:
    """Every refresh would be a line."""


def _stamp(path: pathlib.Path) -> tuple[int, int, int] | None:
  """What changes when a file does; None where there is none."""
  try:
    found = path.stat()
  except OSError:
    return None
  return found.st_mtime_ns, found.st_size, found.st_ino


def _waiting(words: str) -> bytes:
  lines = [f"<h1>{_TITLE}</h1>", f'<p class="note">Waiting: {page.text(words)}.</p>']
  return page.page(_TITLE, lines, REFRESH_SECONDS).encode()
