"""Generated requests against the service's own description: no server error, answers conform."""

import collections

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.envs.service.conftest import ALICE, running

EXAMPLES = 30  # of each route
_MAKERS = ("/v1/sandboxes", "/v1/sandboxes/{sandbox_id}/fork", "/v1/envs")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_no_generated_request_makes_it_fail(tokens_file):
  with running(f"--tokens={tokens_file}") as service, service.client() as client:
    sandbox = client.create(ttl=3600, idle_ttl=3600)
    sandbox.write_file("file", b"content")
    sandbox.session("main")
    env = client.call("POST", "/v1/envs", json={"task": "count/1"}).json()["id"]
    known = {"sandbox_id": sandbox.id, "env_id": env, "name": "main"}
    schema = schemathesis.openapi.from_url(
      f"{service.url}/openapi.json", headers={"Authorization": f"Bearer {ALICE}"}
    )
    seen: dict[str, collections.Counter[int]] = {}
    with service.http() as http:
      for result in schema.get_all_operations():
        operation = result.ok()
        if operation.method.upper() == "DELETE" or operation.path.endswith("/stop"):
          known_here = {}  # or there would be nothing left for the others
        else:
          known_here = known
        seen[operation.label] = _exercise(operation, known_here, http)
      assert http.get("/health").status_code == 200
    assert service.stop() == 0
  print(seen)
  assert not [label for label, found in seen.items() if not found]
  for label in ("POST /v1/sandboxes/{sandbox_id}/commands", "GET /v1/sandboxes/{sandbox_id}"):
    assert seen[label][200], seen


def _exercise(operation, known, http):
  """Sends generated requests, half of them about things that exist. Returns the statuses."""
  statuses: collections.Counter[int] = collections.Counter()

  @hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(case=operation.as_strategy(), real=hypothesis.strategies.booleans())
  def send(case, real):
    if real and isinstance(case.path_parameters, dict):
      for name in case.path_parameters:
        if name in known:
          case.path_parameters[name] = known[name]
    if isinstance(case.body, dict):
      for name in ("timeout", "deadline", "command_timeout", "tests_timeout"):
        if isinstance(case.body.get(name), int | float) and case.body[name] > 1:
          case.body[name] = 1.0  # a valid one that does not take an hour
    case.headers = {**(case.headers or {}), "Authorization": f"Bearer {ALICE}"}
    response = case.call()
    statuses[response.status_code] += 1
    if response.status_code in (201, 202) and operation.path in _MAKERS:
      # Or they fill the host, and each one more waits for room, a minute by default.
      kind = "envs" if operation.path == "/v1/envs" else "sandboxes"
      assert http.delete(f"/v1/{kind}/{response.json()['id']}").status_code == 204
    assert response.status_code < 500 or response.status_code == 503, response.text
    # What is valid by its schema can still ask for too much, or in less time than there is (503).
    excluded = [positive_data_acceptance, not_a_server_error]
    case.validate_response(response, excluded_checks=excluded)

  send()
  return statuses
