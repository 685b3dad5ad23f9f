"""stub"""
import dataclasses
@dataclasses.dataclass(frozen=True)
class Control:
  name: str
  noticed: str
def run_all(canaries, neighbours): return []
