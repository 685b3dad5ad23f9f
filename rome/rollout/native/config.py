"""How a foreign agent is run: the settings `native.*` of a run with `agent.mode="native"`."""

import dataclasses
import math
import urllib.parse


@dataclasses.dataclass(frozen=True)
class NativeConfig:
  """A foreign agent, and how long it is waited for.

  Attributes:
    command: bash text that runs the agent in the sandbox's work directory, as the sandbox's user;
      its exit ends the episode. It finds the task in $ROME_INSTRUCTION and in the file
      $ROME_INSTRUCTION_FILE, the endpoint in $OPENAI_BASE_URL and $OPENAI_API_BASE, its key in
      $OPENAI_API_KEY, the model's name in $OPENAI_MODEL.
    install: bash text that runs before it in every episode: settings files, mostly. Programs belong
      into sandbox.image.
    model: name of the model for the agent; also at the endpoint.
    endpoint: URL of an OpenAI API that answers the agent's calls in the policy's place, such as
      "http://127.0.0.1:8001/v1", for evaluation alone; "" for the policy. The host asks it, the
      sandbox reaches the proxy as ever.
    api_key_variable: variable of the host's environment with the endpoint's key; unset for none.
    port: of 127.0.0.1 in the sandbox, where the endpoint is.
    deadline: seconds that an episode may take, from the agent's start to its exit.
    silence: seconds that the agent may let pass without a call before it counts as hung; and the
      endpoint without a reply.
  """

  command: str = ""
  install: str = ""
  model: str = "rome"
  endpoint: str = ""
  api_key_variable: str = "OPENAI_API_KEY"
  port: int = 8000
  deadline: float = 1800.0
  silence: float = 300.0

  def __post_init__(self) -> None:
    for name in ("command", "install"):
      if "\0" in getattr(self, name):
        raise ValueError(f"native.{name} holds a NUL character, which bash cannot: take it out")
    if not self.model.isprintable() or not self.model:
      raise ValueError(f"native.model must be a printable name, got {self.model!r}")
    if self.endpoint and not _is_url(self.endpoint):
      raise ValueError(
        f"native.endpoint must be a URL of http or https without a user or a query, such as "
        f"http://127.0.0.1:8001/v1, got {self.endpoint!r}"
      )
    if not self.api_key_variable:
      raise ValueError("native.api_key_variable must be a variable's name, got ''")
    if not 1024 <= self.port <= 65535 or self.port == 3128:
      raise ValueError(
        f"native.port must be from 1024 to 65535 and not 3128, the sandbox's own proxy, "
        f"got {self.port}"
      )
    for name in ("deadline", "silence"):
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(f"native.{name} must be above 0 and finite, got {getattr(self, name):g}")


def _is_url(text: str) -> bool:
  try:
    url = urllib.parse.urlsplit(text)
    return bool(
      url.scheme in ("http", "https")
      and url.hostname
      and (url.port is None or url.port > 0)
      and not (url.username or url.password or url.query or url.fragment)
      and text.isprintable()
    )
  except ValueError:
    return False
