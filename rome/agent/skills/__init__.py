"""Context engineering: each part is a `Skill` of the loop, or an observer or a tool of an executor.

  Spill        observer: a long output goes to a file, the model gets its ends and a pointer
  Lossless     skill: knows which reads were superseded; its edit is what `Compress` tries first
  Compress     skill: keeps the context below a share of its limit, by edits, then by a summary
  Remind       skill: restates the objective, tells of finished items and of tools that came or went
  Detect       skill: names loops and failing tools, then ends the episode
  Environment  skill: tells what somebody else changed
  Recall       tool: a search over files and over what has left the context

None knows the others but by what its constructor is given, so each can be left out. Skills act in
the order of their list: `Lossless` stands before `Compress`. All that they say is text behind the
results of a turn; only `Compress` rewrites a context, and never in a turn that does not need it.

Left out: isolation (sub-agents), todo and memory, which are tools.
"""

from rome.agent.skills.compress import Compress
from rome.agent.skills.detect import Detect
from rome.agent.skills.environment import Environment
from rome.agent.skills.lossless import Lossless, Spill
from rome.agent.skills.recall import Recall
from rome.agent.skills.remind import Remind

__all__ = ["Compress", "Detect", "Environment", "Lossless", "Recall", "Remind", "Spill"]
