"""The service over its socket: sandboxes, commands, sessions, errors, tenants, quotas."""

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time

import pytest

from rome.envs import ImageError, Limits, SandboxError, SandboxLost, owner, sandbox_cli
from rome.envs.remote import OutOfCapacity, RemoteError, UnknownRemote
from tests.envs.service.conftest import ALICE, BOB, running


def _error(response, status, code=None):
  assert response.status_code == status, response.text
  error = response.json()["error"]
  assert set(error) == {"code", "message", "mend"} and all(error.values())
  assert code in (None, error["code"])
  return error


def test_a_sandbox_from_its_making_to_its_end(client):
  made = client.create(labels={"episode": "7"}, limits=Limits(memory_mb=128))
  view = made.view()
  assert view["state"] == "running" and view["labels"] == {"episode": "7"}
  assert view["limits"]["memory_mb"] == 128 and view["workdir"] == made.workdir == "/work"
  assert [event["state"] for event in view["history"]] == ["pending", "running"]
  assert made.run("echo hi; exit 3").exit_code == 3 and made.alive()
  assert made.stats()["processes"] >= 1
  assert made.id in [view["id"] for view in client.views()]
  made.stop()
  made.stop()
  assert made.view()["state"] == "stopped" and not made.alive()
  with pytest.raises(SandboxLost, match="is stopped"):
    made.run("true")
  made.close()
  made.close()
  assert [event["state"] for event in made.view()["history"]][-2:] == ["stopped", "deleted"]


def test_making_without_waiting_answers_at_once(service, client):
  with service.http() as http:
    response = http.post("/v1/sandboxes?wait=false", json={})
    assert response.status_code == 202
    path = response.headers["Location"]
    for _ in range(600):
      view = http.get(path).json()
      if view["state"] != "pending":
        break
      time.sleep(0.05)
    assert view["state"] == "running"
    assert http.delete(path).status_code == 204
    assert http.delete(path).status_code == 204


def test_a_command_tells_output_time_out_and_truncation(sandbox):
  result = sandbox.run("cd /tmp; x=5; echo out; echo err >&2")
  assert (result.exit_code, result.output, result.timed_out) == (0, "out\nerr\n", False)
  assert sandbox.run("echo $x $PWD").output == "5 /tmp\n"
  late = sandbox.run("echo before; sleep 30", timeout=0.3)
  assert late.timed_out and late.exit_code is None and late.output.startswith("before")
  assert sandbox.run("echo $x").output == "5\n"
  assert sandbox.run("head -c 100000 /dev/zero | tr '\\0' a").truncated
  with pytest.raises(ValueError, match="NUL"):
    sandbox.run("a\0b")
  with pytest.raises(ValueError, match="timeout"):
    sandbox.run("true", timeout=0)


def test_sessions_are_independent_and_named(sandbox):
  one, two = sandbox.session("one"), sandbox.session("two")
  one.run("x=1")
  two.run("x=2")
  assert (one.run("echo $x").output, two.run("echo $x").output) == ("1\n", "2\n")
  with pytest.raises(RemoteError, match="is open"):
    sandbox.session("one")
  one.close()
  one.close()
  with pytest.raises(UnknownRemote, match="no session one"):
    one.run("true")
  sandbox.session("one").close()
  two.close()


def test_a_started_command_is_polled_typed_to_and_stopped(sandbox):
  shell = sandbox.session("tty", pty=(24, 80))
  shell.start("stty size; read -r line; echo got $line; sleep 600", timeout=900)
  seen = ""
  while "24 80" not in seen:
    seen += shell.poll(5).output
  shell.send(b"word\n")
  while "got word" not in seen:
    seen += shell.poll(5).output
  with pytest.raises(SandboxError):
    shell.run("true")  # one command at a time
  shell.resize(30, 100)
  assert shell.stop().result.timed_out
  assert "30 100" in shell.run("stty size").output
  shell.close()


@pytest.mark.slow
def test_users_of_sessions(sandbox):
  users = {"agent": "1000", "root": "0", 2000: "2000"}
  for user, uid in users.items():
    session = sandbox.session("who", user=user)
    assert session.run("id -u").output == f"{uid}\n"
    session.close()
  with pytest.raises(ValueError):
    sandbox.session("who", user=999)


def test_a_fork_has_the_files_and_the_session_and_goes_its_own_way(sandbox):
  sandbox.run("cd /tmp; echo one > note; x=5")
  with sandbox.fork() as other:
    assert other.id != sandbox.id
    assert other.run("pwd; cat note; echo $x").output == "/tmp\none\n5\n"
    other.run("echo two > note")
    assert sandbox.run("cat note").output == "one\n"


def test_what_was_tried_to_reach_is_told(sandbox):
  assert sandbox.attempts() == []
  sandbox.run("exec 3<>/dev/tcp/127.0.0.1/1 || true; busybox nc -w1 127.0.0.2 9 </dev/null; true")
  assert all(not attempt.allowed for attempt in sandbox.attempts())


def test_verify_runs_as_root_and_reset_forgets(sandbox):
  sandbox.run("echo mine > note; export x=1")
  assert sandbox.verify("cat note; id -u").output == "mine\n0\n"
  sandbox.reset()
  assert sandbox.run("ls; echo $x").output == "\n"


def test_a_command_that_runs_delays_no_other_call(sandbox):
  """Not its files, not its other sessions, not the service."""
  other = sandbox.session("beside")
  with concurrent.futures.ThreadPoolExecutor(1) as threads:
    slow = threads.submit(sandbox.run, "until [ -e go ]; do sleep 0.05; done; echo went", 60)
    assert other.run("echo beside").output == "beside\n"
    sandbox.write_file("go", b"")
    assert slow.result().output == "went\n"
  other.close()


@pytest.mark.parametrize(
  "method, path, arguments, status",
  [
    ("GET", "/v1/sandboxes/none", {}, 404),
    ("GET", "/nowhere", {}, 404),
    ("PATCH", "/v1/sandboxes", {}, 405),
    ("POST", "/v1/sandboxes", {"content": b"{"}, 422),
    ("POST", "/v1/sandboxes", {"json": []}, 422),
    ("POST", "/v1/sandboxes", {"json": {"imagee": "x"}}, 422),
    ("POST", "/v1/sandboxes", {"json": {"image": "no/such:image"}}, 422),
    ("POST", "/v1/sandboxes", {"json": {"limits": {"memory_mb": 1}}}, 422),
    ("POST", "/v1/sandboxes", {"json": {"limits": {"memory_mb": 1 << 19}}}, 422),
    ("POST", "/v1/sandboxes", {"json": {"ttl": -1}}, 422),
    ("POST", "/v1/sandboxes", {"content": b'{"ttl": NaN}'}, 422),
    ("POST", "/v1/sandboxes", {"content": b"x" * (9 << 20)}, 413),
    ("POST", "/v1/envs", {"json": {"task": "../../etc"}}, 422),
    ("POST", "/v1/envs", {"json": {"task": "nonsense/1"}}, 422),
    ("POST", "/v1/envs/none/step", {"json": {"action": "ls"}}, 404),
  ],
)
def test_bad_input_is_told_and_never_a_server_error(service, method, path, arguments, status):
  with service.http() as http:
    headers = {"Content-Type": "application/json"} if "content" in arguments else {}
    error = _error(http.request(method, path, headers=headers, **arguments), status)
    assert "Traceback" not in error["message"]


def test_who_has_no_token_gets_nothing(service):
  with service.http("wrong-0123456789abcdef") as http:
    for method, path in (("GET", "/v1/sandboxes"), ("POST", "/v1/envs"), ("GET", "/metrics")):
      response = http.request(method, path)
      _error(response, 401, "unauthorized")
      assert response.headers["WWW-Authenticate"].startswith("Bearer")
    assert http.get("/").headers["WWW-Authenticate"].startswith("Basic")
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").status_code == 200


def test_nobody_sees_another_tenants_sandbox(service, sandbox):
  with service.http(BOB) as http:
    assert http.get("/v1/sandboxes").json() == {"sandboxes": []}
    base = f"/v1/sandboxes/{sandbox.id}"
    unknown = http.get("/v1/sandboxes/" + "0" * len(sandbox.id)).json()["error"]
    for method, path, body in (
      ("GET", "", None),
      ("POST", "/stop", None),
      ("DELETE", "", None),
      ("POST", "/commands", {"command": "id"}),
      ("POST", "/sessions", {"name": "x"}),
      ("POST", "/reset", None),
      ("GET", "/stats", None),
      ("GET", "/files?path=x", None),
      ("PUT", "/files?path=x", None),
      ("GET", "/directory", None),
    ):
      error = _error(http.request(method, base + path, json=body), 404, "unknown_sandbox")
      assert error["message"] == f"there is no sandbox {sandbox.id}"
      assert error["mend"] == unknown["mend"]
    assert sandbox.id not in http.get("/").text
  assert sandbox.alive()


def test_quotas_hold_and_are_given_back(service):
  with service.client(BOB) as client:
    with pytest.raises(RemoteError, match="more than the quota") as error:
      client.create(limits=Limits(memory_mb=601))
    assert error.value.status == 422
    with client.create() as first, client.create() as second:
      with pytest.raises(OutOfCapacity, match="quota|sandboxes") as refused:
        client.create()
      assert refused.value.status == 429
      second.close()
      with client.create(limits=Limits(memory_mb=300)) as third:
        assert first.alive() and third.alive()
    env = client.call("POST", "/v1/envs", json={"task": "count/1"}).json()["id"]
    with client.create(), client.create():
      with pytest.raises(OutOfCapacity):
        client.call("POST", f"/v1/envs/{env}/reset", json={})
    client.call("POST", f"/v1/envs/{env}/reset", json={})
    client.call("DELETE", f"/v1/envs/{env}")
    assert all(view["state"] == "deleted" for view in client.views())


def _kill_newest(service):
  """Kills the process of the youngest sandbox of a service, from outside."""
  pid = str(service.process.pid)
  mine = [
    owner.runtime_dir() / name
    for name, label in sandbox_cli.owned_directories().items()
    if label.split(":")[2:3] == [pid]
  ]
  newest = max(mine, key=lambda path: (path / "process").stat().st_ctime_ns)
  os.kill(int((newest / "process").read_text().split(":")[2]), signal.SIGKILL)


def test_a_dead_sandbox_is_gone_not_a_server_error(service, client):
  made = client.create()
  made.session("held")
  _kill_newest(service)
  with service.http() as http:
    response = http.post(f"/v1/sandboxes/{made.id}/commands", json={"command": "true"})
    assert "is lost" in _error(response, 410, "sandbox_lost")["message"]
  with pytest.raises(SandboxLost):
    made.run("true")
  assert not made.alive() and made.view()["state"] == "failed" and made.view()["error"]
  made.close()


@pytest.mark.slow
def test_who_hangs_up_while_a_sandbox_waits_for_room_does_not_get_it(tokens_file):
  """More are asked for than there is room for; the one that waits is given up with its client."""
  with running(f"--tokens={tokens_file}") as service, service.client() as client:
    with service.http() as http:
      text = http.get("/metrics").text
    capacity = re.search(r"^rome_sandbox_capacity_memory_mb (\S+)$", text, re.MULTILINE)
    half = int(float(capacity[1]) * 0.45)
    big = Limits(memory_mb=half, disk_mb=1)
    with client.create(limits=big), client.create(limits=big):
      body = json.dumps({"limits": {"memory_mb": half, "disk_mb": 1}, "deadline": 300}).encode()
      host, port = service.url.removeprefix("http://").split(":")
      with socket.create_connection((host, int(port))) as raw:
        raw.sendall(
          b"POST /v1/sandboxes HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
          + f"Authorization: Bearer {ALICE}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
          + body
        )
        while len(client.views()) < 3:
          time.sleep(0.02)
        assert client.views()[2]["state"] == "pending"
      while client.views()[2]["state"] == "pending":
        time.sleep(0.02)
      assert client.views()[2]["state"] == "deleted"
      with pytest.raises(OutOfCapacity, match="no room") as error:
        client.create(limits=big, deadline=1)
      assert error.value.status == 503
    assert service.stop() == 0


@pytest.mark.slow
def test_many_clients_at_once_get_their_own_answers(service, sandbox):
  """32 clients, each with a session or a connection of its own."""
  failures = []

  def work(number):
    try:
      with service.client() as mine:
        for round_ in range(5):
          found = mine.get(sandbox.id).run(f"echo {number} {round_}", 60)
          assert found.output == f"{number} {round_}\n"
          assert mine.view(sandbox.id)["state"] == "running"
    except BaseException as error:
      failures.append(error)

  threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not failures


def test_metrics_count_and_name_no_path_that_a_client_made_up(service):
  with service.http() as http:
    http.get("/made/up/path")
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    text = response.text
    assert 'rome_requests_total{method="GET",route="none",status="404"}' in text
    assert "made/up" not in text and "rome_sandbox_" in text


def test_the_description_lists_every_route_with_its_errors(service):
  with service.http() as http:
    description = http.get("/openapi.json").json()
  assert description["openapi"].startswith("3.1")
  for path, methods in description["paths"].items():
    for method, operation in methods.items():
      assert "422" in operation["responses"] and "HTTPValidationError" not in str(operation), path
      if path.startswith("/v1/"):
        assert operation["security"] and {"401", "429", "503"} <= set(operation["responses"])
      assert operation["summary"], (method, path)


def test_curl_alone_is_enough(service):
  def curl(*arguments):
    command = ["curl", "-sS", "--noproxy", "*", "-H", f"Authorization: Bearer {ALICE}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout

  base = f"{service.url}/v1/sandboxes"
  typed = ("-H", "Content-Type: application/json", "-d")
  made = json.loads(curl(base, *typed, "{}"))["id"]
  result = json.loads(curl(f"{base}/{made}/commands", *typed, '{"command": "echo hi"}'))
  assert result["output"] == "hi\n"
  assert curl("-X", "DELETE", f"{base}/{made}", "-w", "%{http_code}") == b"204"


@pytest.mark.slow
def test_a_committed_image_is_the_tenants_own(tokens_file):
  image = "localhost/rome-tenant.alice.mine"
  try:
    with running(f"--tokens={tokens_file}", "--sandbox=podman") as service:
      with service.client() as client, client.create() as made:
        made.run("echo kept > note")
        assert made.commit("mine") == image
        with client.create(image) as other:
          assert other.run("cat note").output == "kept\n"
        with service.client(BOB) as stranger, pytest.raises(ImageError, match="there is no image"):
          stranger.create(image)
      assert service.stop() == 0  # and with it the containers that use the image
  finally:
    subprocess.run(["podman", "rmi", image], check=False, capture_output=True, timeout=60)
  left = subprocess.run(["podman", "images", "-q", image], capture_output=True, timeout=60)
  assert left.stdout == b""
