"""The Python of the guide's section on contexts runs as it stands there."""

import pathlib
import re

import pytest

GUIDE = pathlib.Path(__file__).parents[3] / "docs" / "guides" / "agent.md"


@pytest.mark.slow
def test_the_guide_runs():
  text = GUIDE.read_text()
  (section,) = re.findall(r"^## Context\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
  (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
  exec(compile(block, "the guide", "exec"), {})
