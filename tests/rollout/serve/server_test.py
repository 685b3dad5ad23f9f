"""The process: start, many clients, clients that vanish or do not read, drain, end."""

import asyncio
import concurrent.futures
import json
import signal
import socket
import subprocess
import time

import httpx
import openai
import pytest

from rome.rollout.serve import cli
from tests.rollout.serve.conftest import KEY, OTHER, command, running

URL = "/v1/completions"
# About a thousand tokens, as nothing ends them.
LONG = {"model": "micro", "prompt": "a", "ignore_eos": True, "seed": 1}


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--model=micro", "--host=0.0.0.0"], "refusing to listen on 0.0.0.0 without a key"),
    (["--model=micro", "--port=99999"], "cannot listen"),
    (["--model=nothing", "--port=0"], "--model=nothing is no directory"),
    (["--model=qwen3_30b_a3b", "--port=0"], "has no tokenizer"),
    (["--model=micro", "--port=0", "--slots=0"], "slots must be at least 1"),
    (["--model=micro", "--port=0", "--max_length=1"], "max_length must be at least 2"),
    (["--model=micro", "--port=0", "--max_length=99999"], "--max_length=99999 is more than"),
    (["--model=micro", "--port=0", "--cache_tokens=5"], "cache_tokens=5"),
    (["--model=micro", "--port=0", "--api_key=short"], "shorter than 8 characters"),
    (["--model=micro", "--port=0", "--api_key=long-enough"] * 2, "the same key is given twice"),
  ],
)
def test_what_cannot_start_says_why(capsys, arguments, message):
  assert cli.main(arguments) == 1
  (error,) = capsys.readouterr().err.splitlines()
  assert error.startswith("rome serve: ") and message in error


def test_a_directory_that_holds_no_model(capsys, tmp_path):
  assert cli.main([f"--model={tmp_path}", "--port=0"]) == 1
  assert str(tmp_path) in capsys.readouterr().err


def test_a_port_in_use_is_said_before_anything_is_loaded(capsys):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    # The model does not exist, which would be found as soon as it was looked for.
    assert cli.main(["--model=nothing", f"--port={port}"]) == 1
  (error,) = capsys.readouterr().err.splitlines()
  assert "cannot listen on 127.0.0.1 port" in error and "in use" in error


@pytest.mark.slow
def test_what_cannot_be_loaded_ends_it_with_one_line():
  done = subprocess.run(
    command("--model=micro", "--port=0", "--dtype=int7"),
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 1 and not done.stdout
  (line,) = done.stderr.splitlines()
  assert line.startswith("rome serve: ") and "int7" in line


@pytest.mark.slow
def test_while_it_loads_it_says_so_and_can_be_stopped():
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  process = subprocess.Popen(
    command("--model=tiny", f"--port={port}"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  url, seen = f"http://127.0.0.1:{port}", None
  try:
    end = time.monotonic() + 60
    while seen is None and time.monotonic() < end:
      try:
        seen = httpx.get(f"{url}/health", trust_env=False, timeout=30)
      except httpx.TransportError:
        time.sleep(0.02)
    assert seen.status_code == 503 and seen.json()["error"]["code"] == "engine_loading"
    body = {"model": "tiny", "prompt": "a"}
    answer = httpx.post(url + URL, json=body, trust_env=False, timeout=30)
    assert answer.status_code == 503 and answer.headers["retry-after"]
  finally:
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
  assert (process.returncode, out, err) == (0, b"", b"")


def until(condition, seconds=20):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "it did not come to pass"
    time.sleep(0.02)


@pytest.mark.slow
def test_a_client_that_is_killed_frees_its_slots(micro):
  for stream in (True, False):
    before = micro.gauge("sampled_tokens")
    body = json.dumps(LONG | {"n": 128, "stream": stream})
    headers = ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    curl = subprocess.Popen(
      ["curl", "-sSN", "--noproxy", "*", *headers, "-d", "@-", micro.url + URL],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    curl.stdin.write(body.encode())
    curl.stdin.close()
    until(lambda: micro.gauge("running") == 8 and micro.gauge("waiting") > 50)
    curl.kill()
    curl.wait()
    curl.stdout.close()
    until(lambda: micro.gauge("running") == micro.gauge("waiting") == 0, seconds=5)
    assert micro.gauge("sampled_tokens") - before < 128 * 1000 / 2


@pytest.mark.slow
def test_a_full_queue_says_so_and_when_to_come_again(micro):
  """128 may wait: with 8 running, 120 and then 20 more are too many."""
  with micro.http() as http, concurrent.futures.ThreadPoolExecutor(1) as threads:
    with http.stream("POST", URL, json=LONG | {"n": 128, "stream": True}) as first:
      assert first.status_code == 200
      until(lambda: micro.gauge("running") == 8)
      answer = threads.submit(http.post, URL, json=LONG | {"n": 20}).result()
      assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
      assert answer.json()["error"]["code"] == "queue_full"
      assert micro.gauge("waiting") <= 120
    until(lambda: micro.gauge("running") == micro.gauge("waiting") == 0)
  with micro.openai(max_retries=3) as client:
    assert client.completions.create(model="micro", prompt="a", max_tokens=1).choices


@pytest.mark.slow
def test_a_client_that_does_not_read_holds_up_nobody(micro):
  host, port = micro.url.removeprefix("http://").split(":")
  body = json.dumps(LONG | {"n": 8, "stream": True, "logprobs": 20}).encode()
  with socket.create_connection((host, int(port))) as slow:
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.sendall(
      f"POST {URL} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
      f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
      + body
    )
    until(lambda: micro.gauge("running") == 8)
    start = time.monotonic()
    with micro.openai(OTHER) as client:
      client.completions.create(model="micro", prompt="b", max_tokens=20)
    # The engine went on for the one that does not read: its slots came free.
    until(lambda: micro.gauge("running") == 0)
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_two_hundred_streams_at_once(micro):
  """More than may wait are told so, and come again; everybody gets every token."""

  async def one(http, number):
    body = {**LONG, "prompt": [number % 256, 7], "max_tokens": 40, "stream": True}
    body |= {"return_token_ids": True, "user": f"u{number % 7}"}
    while True:
      async with http.stream("POST", URL, json=body) as response:
        if response.status_code == 429:
          await response.aread()
          await asyncio.sleep(0.5)
          continue
        assert response.status_code == 200
        ids, done = [], False
        async for line in response.aiter_lines():
          if line == "data: [DONE]":
            done = True
          elif line:
            ids += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
        assert done
        return tuple(ids)

  async def everybody():
    limits = httpx.Limits(max_connections=250)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(
      base_url=micro.url, headers=headers, timeout=120, trust_env=False, limits=limits
    ) as http:
      return await asyncio.gather(*(one(http, number) for number in range(200)))

  found = asyncio.run(everybody())
  assert [len(ids) for ids in found] == 200 * [40]
  assert len(set(found)) == 200  # prompts differ, so replies of 40 tokens do


@pytest.mark.slow
def test_the_clients_of_two_keys_take_turns(micro):
  """One key's hundred requests do not make the other's one wait for all of them."""
  with (
    micro.http() as http,
    http.stream("POST", URL, json=LONG | {"n": 100, "stream": True}) as all_,
  ):
    assert all_.status_code == 200
    until(lambda: micro.gauge("waiting") > 50)
    with micro.openai(OTHER) as client:
      client.completions.create(model="micro", prompt="b", max_tokens=5)
    assert micro.gauge("waiting") > 20
  until(lambda: micro.gauge("running") == 0)


@pytest.mark.slow
def test_requests_have_a_deadline():
  with running("--model=micro", "--deadline=0.3", "--slots=2", "--max_length=16384") as server:
    with server.openai() as client:
      for extra in ({"logprobs": 5}, {"n": 4}):
        asked = {"model": "micro", "prompt": "a", "extra_body": {"ignore_eos": True}, **extra}
        with pytest.raises(openai.InternalServerError) as error:
          client.completions.create(**asked)
        assert error.value.status_code == 504 and error.value.code == "deadline"
        with pytest.raises(openai.APIError, match="not done within 0.3 s"):
          list(client.completions.create(stream=True, **asked))
      until(lambda: server.gauge("running") == server.gauge("waiting") == 0)
    assert server.stop() == 0


@pytest.mark.slow
def test_sigterm_lets_what_runs_end_and_refuses_the_rest():
  with running("--model=micro", "--slots=2", "--max_length=8192") as server:
    body = {**LONG, "max_tokens": 4000, "stream": True}
    with server.http() as http, http.stream("POST", URL, json=body) as response:
      lines = response.iter_lines()
      next(lines)
      server.process.send_signal(signal.SIGTERM)
      with server.http() as other:
        until(lambda: other.get("/ready").status_code == 503)
        assert other.get("/health").json()["status"] == "draining"
        refused = other.post(URL, json={**LONG, "max_tokens": 1})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "draining"
      assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert server.process.wait(30) == 0
    assert not server.errors()


@pytest.mark.slow
def test_the_drain_has_an_end():
  arguments = ("--model=micro", "--slots=1", "--max_length=32768", "--drain=0.5")
  with running(*arguments) as server, server.openai() as client:
    stream = client.completions.create(
      model="micro", prompt="a", stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    start = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError, match="being stopped"):
      list(stream)
    assert server.process.wait(30) == 0
    assert time.monotonic() - start < 10


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once():
  with running("--model=micro", "--slots=1", "--max_length=32768", "--drain=600") as server:
    body = {**LONG, "stream": True, "n": 64}
    with server.http() as http, http.stream("POST", URL, json=body) as response:
      lines = response.iter_lines()  # kept: without it the connection closes
      next(lines)
      server.process.send_signal(signal.SIGTERM)
      with server.http() as other:
        until(lambda: other.get("/ready").status_code == 503)
      start = time.monotonic()
      server.process.send_signal(signal.SIGTERM)
      assert server.process.wait(30) == -signal.SIGTERM
      assert time.monotonic() - start < 5
