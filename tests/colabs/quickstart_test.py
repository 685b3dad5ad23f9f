"""The notebook runs from top to bottom, with the values of its parameter cell made tiny."""

import ast
import json
import pathlib

import nbclient
import nbformat
import pytest

from rome.train.metrics import read_jsonl

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "colabs" / "quickstart.ipynb"
TINY = {
  "BACKEND": "bubblewrap", "MODEL": "micro", "DEMONSTRATIONS": 6, "WARM_START_UPDATES": 2,
  "IPA_UPDATES": 3, "BATCH": 4, "HELD_OUT_INSTANCES": 6, "FAMILIES": ("count", "move"),
}  # fmt: skip


@pytest.fixture
def notebook():
  return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_short_and_committed_clean(notebook):
  nbformat.validate(notebook)
  assert 10 <= len(notebook.cells) <= 20
  for cell in code_cells(notebook):
    assert len(cell.source.splitlines()) <= 20
    assert not cell.outputs and cell.execution_count is None


def test_it_imports_from_rome_alone(notebook):
  """Besides the standard library and what draws the curves."""
  names = set()
  for cell in code_cells(notebook):
    for node in ast.walk(ast.parse(cell.source)):
      if isinstance(node, ast.Import):
        names |= {alias.name.partition(".")[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        names.add(node.module.partition(".")[0])
  assert names == {"rome", "matplotlib", "pathlib", "tempfile"}


@pytest.mark.slow
def test_it_runs(notebook, tmp_path):
  (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
  values = TINY | {"WORKDIR": str(tmp_path)}
  assigned = {
    node.targets[0].id for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)
  }
  assert assigned == values.keys()
  cell.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
  client = nbclient.NotebookClient(
    notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
  )
  client.execute()

  def shown(part):
    """What the one cell whose source holds `part` printed."""
    (cell,) = (c for c in code_cells(notebook) if part in c.source)
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")

  printed = shown("make_sandbox(")
  assert "agent" in printed and "hello from /work/notes" in printed and "timed_out=True" in printed
  assert "reward: 1.0" in shown("TerminalEnv(task")
  assert "<|user|>How many lines" in shown("render_prompt(")
  assert "before: 0." in shown("success_{when}") and " after: 0." in shown("success_{when}")
  assert shown("episode = ").splitlines()[-1].startswith(("success", "failure ("))
  assert "hidden_size=16" in shown("models.load(")
  (plot,) = (c for c in code_cells(notebook) if "plt.subplots" in c.source)
  assert len(read_jsonl(tmp_path / "metrics.jsonl")) >= 3
  assert json.loads((tmp_path / "summary.json").read_text())["instances"] == 6
  assert any("image/png" in output.get("data", {}) for output in plot.outputs)
