"""Start, refusal to start, slow clients, drain, sudden death, TLS."""

import concurrent.futures
import contextlib
import signal
import socket
import subprocess
import time

import pytest

from rome.envs import SandboxError, sandbox_cli
from rome.envs.remote import Client, RemoteError
from rome.envs.service import server, sockets
from rome.envs.service.auth import Tokens, load_tokens
from rome.envs.service.core import ServiceConfig
from tests.envs.service.conftest import ALICE, running


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_no_listening_elsewhere_without_a_token(host, tokens_file):
  with pytest.raises(server.ServeError, match="without a token: give --tokens FILE"):
    server.check(ServiceConfig(host=host), Tokens())
  server.check(ServiceConfig(host=host), load_tokens(tokens_file, {}))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_needs_no_token(host):
  server.check(ServiceConfig(host=host), Tokens())


def test_half_of_tls_is_refused(tmp_path):
  with pytest.raises(server.ServeError, match="both"):
    server.check(ServiceConfig(certfile="x"), Tokens())


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--host=0.0.0.0"], "refusing to listen on 0.0.0.0 without a token"),
    (["--tokens=/does/not/exist"], "tokens file /does/not/exist"),
    (["--port=99999"], "cannot listen"),
    (["--port=0", "--certfile=/none", "--keyfile=/none"], "TLS certificate /none"),
  ],
)
def test_what_cannot_start_says_why(capsys, monkeypatch, arguments, message):
  monkeypatch.delenv("ROME_SANDBOX_TOKEN", raising=False)
  assert sandbox_cli.main(["serve", *arguments]) == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith("rome sandbox: ") and message in error


def _connect(service):
  host, port = service.url.removeprefix("http://").split(":")
  return socket.create_connection((host, int(port)), timeout=60)


def test_garbage_is_a_bad_request_and_hurts_nobody(service):
  for raw in (b"\x00\xff\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 100_000 + b"\r\n"):
    with _connect(service) as connection:
      connection.sendall(raw)
      with contextlib.suppress(ConnectionResetError):
        assert connection.recv(100).startswith((b"HTTP/1.1 400", b""))
  with service.http() as http:
    assert http.get("/health").status_code == 200


@pytest.mark.slow
def test_a_foreign_page_cannot_use_a_service_without_tokens():
  with running() as service, service.http(token=None) as http:
    port = service.url.rpartition(":")[2]
    assert http.get("/v1/sandboxes").status_code == 200
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
      response = http.post("/v1/envs", json={}, headers=headers)
      assert response.status_code == 403, headers
      assert response.json()["error"]["code"] == "foreign_origin"
    assert http.get("/", headers={"Host": f"localhost:{port}"}).status_code == 200
    assert service.stop() == 0


@pytest.mark.slow
def test_a_client_that_sends_nothing_more_is_cut_off(service):
  """Its headers have a deadline of their own."""
  with _connect(service) as connection:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost:")
    start = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
      assert connection.recv(100) == b""
    assert time.monotonic() - start < sockets.HEADERS_IN + 30


@pytest.mark.slow
def test_a_body_that_stops_coming_is_answered(service, sandbox):
  with _connect(service) as connection:
    connection.sendall(
      f"PUT /v1/sandboxes/{sandbox.id}/files?path=x HTTP/1.1\r\nHost: x\r\n"
      f"Authorization: Bearer {ALICE}\r\nContent-Length: 10\r\n\r\nabc".encode()
    )
    connection.settimeout(90)
    assert connection.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.slow
def test_sigterm_lets_a_running_command_end_and_leaves_nothing(tokens_file):
  with running(f"--tokens={tokens_file}", "--drain=60") as service, service.client() as client:
    made = client.create()
    client.create()
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
      answer = threads.submit(made.run, "touch begun; sleep 3; echo drained", 30)
      with service.client() as other:
        listing = f"/v1/sandboxes/{made.id}/directory"
        while "begun" not in other.call("GET", listing).text:
          assert not answer.done(), answer.result()
          time.sleep(0.05)
      service.process.send_signal(signal.SIGTERM)
      assert answer.result().output == "drained\n"
    assert service.stop() == 0
    with pytest.raises(RemoteError, match="cannot be reached"):
      made.run("true")
    assert not _directories_of(service.process.pid)


@pytest.mark.slow
def test_drain_has_an_end(tokens_file):
  with running(f"--tokens={tokens_file}", "--drain=1") as service, service.client() as client:
    made = client.create()
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
      answer = threads.submit(made.run, "touch begun; sleep 600", 60)
      listing = f"/v1/sandboxes/{made.id}/directory"
      while "begun" not in client.call("GET", listing).text:
        assert not answer.done(), answer.result()
        time.sleep(0.05)
      start = time.monotonic()
      assert service.stop() == 0
      assert time.monotonic() - start < 45
      with pytest.raises(SandboxError):
        answer.result(timeout=60)
    assert not _directories_of(service.process.pid)


def _directories_of(pid):
  labels = sandbox_cli.owned_directories()
  return [name for name, label in labels.items() if label.split(":")[2:3] == [str(pid)]]


@pytest.mark.slow
def test_after_sudden_death_the_next_service_sweeps(tokens_file):
  with running(f"--tokens={tokens_file}") as service, service.client() as client:
    client.create()
    pid = service.process.pid
    assert _directories_of(pid)
    service.process.kill()
    service.process.wait()
    assert _directories_of(pid)
    with pytest.raises(RemoteError):
      client.views()
  with running(f"--tokens={tokens_file}") as service, service.client() as client:
    assert not _directories_of(pid)
    assert client.views() == []
    with client.create() as made:
      assert made.run("echo anew").output == "anew\n"


@pytest.fixture
def certificate(tmp_path):
  command = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
    "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
  )
  files = [str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")]
  subprocess.run(
    [*command.split(), "-keyout", files[0], "-out", files[1]], check=True, capture_output=True
  )
  return files


@pytest.mark.slow
def test_tls(tokens_file, certificate):
  key, cert = certificate
  arguments = (f"--tokens={tokens_file}", f"--certfile={cert}", f"--keyfile={key}")
  with running(*arguments) as service:
    assert service.url.startswith("https://")
    with Client(service.url, ALICE, certificates=cert) as client:
      assert client.views() == []
    with Client(service.url, ALICE) as client, pytest.raises(RemoteError, match="CERTIFICATE"):
      client.views()
    assert service.stop() == 0


@pytest.mark.slow
def test_ctrl_c_ends_it_cleanly():
  with running() as service:
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(60) == 0
