"""The Python of the guide runs as it stands there."""

import pathlib
import re

import pytest

GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "guides" / "sandboxes.md"


@pytest.mark.slow
def test_the_guide_runs():
  blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
  assert len(blocks) >= 6
  names: dict[str, object] = {}
  for i, block in enumerate(blocks):
    exec(compile(block, f"block {i} of the guide", "exec"), names)
