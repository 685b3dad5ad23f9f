"""Generated requests against the server's own description: no server error, answers conform."""

import collections
import json
import random

import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.rollout.serve.conftest import KEY

pytestmark = pytest.mark.slow

EXAMPLES = 40  # of each route
SEED, ROUNDS = 7, 600
PATHS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}


@pytest.mark.timeout(900)
def test_no_generated_request_makes_it_fail(micro):
  headers = {"Authorization": f"Bearer {KEY}"}
  schema = schemathesis.openapi.from_url(f"{micro.url}/openapi.json", headers=headers)
  seen: dict[str, collections.Counter[int]] = {}
  for result in schema.get_all_operations():
    operation = result.ok()
    seen[operation.label] = _exercise(operation)
  with micro.http() as http:
    assert http.get("/health").json() == {"status": "ok", "version": 0}
  print(seen)
  assert len(seen) == 7 and all(seen.values())
  assert all(seen[f"POST {path}"][200] for path in PATHS), seen


def _exercise(operation):
  """Sends generated requests, most of them for the model that there is. Returns the statuses."""
  statuses: collections.Counter[int] = collections.Counter()

  booleans = hypothesis.strategies.booleans()

  @hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(case=operation.as_strategy(), known=booleans, streamed=booleans)
  def send(case, known, streamed):
    if isinstance(case.body, dict) and known:
      case.body |= {"model": "micro", "max_tokens": 3, "n": 2, "stream": streamed}
      # What may not stand together, or with anything but some values.
      for name in ("max_completion_tokens", "prompt_token_ids", "top_logprobs", "tool_choice"):
        case.body.pop(name, None)
      for name in ("stream_options", "stop_token_ids", "chat_template_kwargs", "logit_bias"):
        case.body.pop(name, None)
      if operation.path.startswith("/v1/chat"):
        case.body["messages"] = case.body.get("messages") or VALUES[26]
    case.headers = {**(case.headers or {}), "Authorization": f"Bearer {KEY}"}
    response = case.call()
    statuses[response.status_code] += 1
    assert response.status_code < 500, response.text
    # What is valid by its schema can still be for a model that is not there, or too long for it.
    case.validate_response(response, excluded_checks=[positive_data_acceptance])

  send()
  return statuses


VALUES = [
  *(None, True, False, 0, 1, -1, 2, 0.5, 1e308, 10**30, "", "a", "auto", "\ud800", "\x00"),
  *([], {}, [None], [[]], ["a"], [1], [[1]], {"a": 1}, {"1": 1}, {"type": "text"}, [{}]),
  *([{"role": "user", "content": "x"}], [{"role": "assistant", "content": None}]),
  *([{"type": "function", "function": {"name": "f", "parameters": {"a": [{"b": "\ud800"}]}}}],),
  *([{"role": "tool", "content": "x"}], [{"role": "user", "content": [{"type": "text"}]}]),
  *({"include_usage": True}, {"enable_thinking": False}, [0, 263], ["a", "b"], 10 * [10 * [1]]),
]


def test_fields_with_values_of_each_other(micro):
  """Every field of the API, several at a time, with values that are right for another one."""
  rng = random.Random(SEED)
  found: collections.Counter[int] = collections.Counter()
  with micro.http() as http:
    schema = http.get("/openapi.json").json()["components"]["schemas"]
    names = sorted({*schema["ChatIn"]["properties"], *schema["CompletionIn"]["properties"]})
    for _ in range(ROUNDS):
      path = rng.choice(sorted(PATHS))
      body = {"model": "micro", "max_tokens": 2}
      body |= {"messages": VALUES[26]} if path.startswith("/v1/chat") else {"prompt": "a"}
      body |= {rng.choice(names): rng.choice(VALUES) for _ in range(rng.randrange(4))}
      response = http.post(
        path, content=json.dumps(body), headers={"Content-Type": "application/json"}
      )
      found[response.status_code] += 1
      assert response.status_code in (200, 400, 404), (body, response.text)
      if response.status_code != 200:
        assert response.json()["error"]["message"], body
  assert found[200] > ROUNDS / 20 and found[400] > ROUNDS / 20, found
