"""Two real agents, unmodified: what runs them, what they say first, and what solves a task."""

import dataclasses

from rome.rollout import NativeConfig


@dataclasses.dataclass(frozen=True)
class Foreign:
  """An agent.

  Attributes:
    recipe: of its image.
    native: how it is run.
    tool: the schema of its only tool, as it sends it.
    system: its system prompt, "" for none.
    leave: what the policy says at the end.
  """

  recipe: str
  native: NativeConfig
  tool: dict
  system: str
  leave: str

  def opening(self, instruction):
    system = [{"role": "system", "content": self.system}] if self.system else []
    return [*system, {"role": "user", "content": instruction}]


def _tool(name):
  parameters = {
    "type": "object",
    "properties": {"command": {"type": "string"}},
    "required": ["command"],
  }
  return {"type": "function", "function": {"name": name, "parameters": parameters}}


_MINI_SETTINGS = """cat > ~/mini.yaml <<'END'
agent:
  system_template: "Use bash."
  instance_template: "{{task}}"
  step_limit: 4
  cost_limit: 0
  max_consecutive_format_errors: 0
model:
  model_name: openai/rome
  cost_tracking: ignore_errors
  observation_template: "{{output.output}}"
  format_error_template: "{{error}}"
END
"""
_MINI = """export MSWEA_CONFIGURED=true MSWEA_SILENT_STARTUP=1 LITELLM_LOCAL_MODEL_COST_MAP=True
exec mini -c ~/mini.yaml -t "$ROME_INSTRUCTION" --yolo --exit-immediately -o ~/mini.json
"""
MINI = Foreign(
  "mini-swe-agent",
  NativeConfig(command=_MINI, install=_MINI_SETTINGS),
  _tool("bash"),
  "Use bash.",
  "<|call|>bash echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT",
)

_LLM_SETTINGS = """mkdir ~/llm
cat > ~/llm/extra-openai-models.yaml <<END
- model_id: rome
  model_name: rome
  api_base: $OPENAI_BASE_URL
  api_key_name: openai
  supports_tools: true
END
cat > ~/tools.py <<'END'
import subprocess

def sh(command: str) -> str:
  return subprocess.run(command, shell=True, capture_output=True, text=True).stdout
END
"""
_LLM = """export LLM_USER_PATH=~/llm
exec llm -m rome --no-log --chain-limit 3 --functions ~/tools.py "$ROME_INSTRUCTION"
"""
LLM = Foreign("llm", NativeConfig(command=_LLM, install=_LLM_SETTINGS), _tool("sh"), "", "done")
