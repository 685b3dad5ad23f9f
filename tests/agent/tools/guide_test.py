"""The Python of the guide's section on tools runs in a sandbox as it stands there."""

import pathlib
import re

import pytest

GUIDE = pathlib.Path(__file__).parents[3] / "docs" / "guides" / "agent.md"


@pytest.mark.slow
def test_the_guide_runs():
  (section,) = re.findall(
    r"^## Tools\n(.*?)(?=^## |\Z)", GUIDE.read_text(), re.DOTALL | re.MULTILINE
  )
  blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
  assert len(blocks) == 2
  names: dict[str, object] = {}
  for i, block in enumerate(blocks):
    exec(compile(block, f"block {i} of the guide", "exec"), names)
