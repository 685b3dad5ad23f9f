"""The chat template of the byte tokenizer, rendered straight to token ids.

  <|bos|> <|system|> TEXT <|end|> <|user|> TEXT <|end|> <|assistant|> ... <|end|>
  <|tool|> TEXT <|end|> <|assistant|> ...

The policy samples everything after `<|assistant|>` up to and including `<|end|>`; a context only
ever grows by appending. Conversations that come as messages are `rome.text.templates`'s, for this
tokenizer too.
"""

from rome.text.byte_tokenizer import ByteTokenizer


def render_prompt(tokenizer: ByteTokenizer, system: str, instruction: str) -> list[int]:
  """Ids of a fresh context that ends where the policy's first reply begins.

  An empty `system` is left out.
  """
  t = tokenizer
  ids = [t.bos]
  if system:
    ids += [t.system, *t.encode(system), t.end]
  return [*ids, t.user, *t.encode(instruction), t.end, t.assistant]


def render_observation(tokenizer: ByteTokenizer, text: str) -> list[int]:
  """Ids appended after a finished reply: the tool's output and the opening of the next reply."""
  t = tokenizer
  return [t.tool, *t.encode(text), t.end, t.assistant]
