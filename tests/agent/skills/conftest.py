"""A workspace for each file of tests."""

import pytest

from tests.agent.skills.places import workspace


@pytest.fixture(scope="module")
def place():
  with workspace() as found:
    yield found
