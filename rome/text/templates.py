"""Chat templates: a checkpoint's own jinja source, rendered to text and to token ids.

A template comes with a checkpoint and messages come from anywhere; neither is trusted.

  The template runs in jinja's immutable sandbox and sees plain JSON data: it cannot reach python.
  Loops and calls share a budget and the output has a limit, so it cannot hang. Not bounded: memory
  (a string can be doubled in each of a few steps), so give a process that renders templates of
  unknown checkpoints a limit.

  Messages cannot forge specials. `encode_chat` renders with a character (or two) found nowhere else
  set into every special that a message contains. What still reads as a special then is the
  template's own and becomes its id; the character is taken out again, and all other text is encoded
  as text. The result is checked against the plain rendering: a template that garbles the character
  is an error, never a forgery. What a template itself joins to a special out of pieces
  (`'<|' + role + '|>'`) counts as its own.

Source: `apply_chat_template` of transformers 5.23, whose text and ids these are where no message
contains a special. Left out: documents, continuing the last message, masks of assistant tokens (the
tag `generation` only renders its body).
"""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from rome.text.tokenizer import Tokenizer

MAX_SOURCE = 1 << 18  # characters of a template
MAX_OUTPUT = 1 << 24  # characters it may render
MAX_STEPS = 200_000  # iterations and calls together

_steps: ContextVar[list[int]] = ContextVar("steps")
_PRIVATE = [chr(code) for code in range(0xE000, 0xF900)]
_REASONING = ("reasoning_content", "thinking", "reasoning")


def _step() -> None:
  left = _steps.get()
  left[0] -= 1
  if left[0] < 0:
    raise jinja2.exceptions.SecurityError(f"more than {MAX_STEPS} iterations and calls")


def _counted(values: Any) -> Iterator[Any]:
  for value in values:
    _step()
    yield value


class _Generation(jinja2.ext.Extension):
  """`{% generation %}...{% endgeneration %}` marks what the model wrote; rendered as its body."""

  tags = {"generation"}

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

  def _body(self, caller: Callable[[], str]) -> str:
    return caller()


class _Namespace(jinja2.utils.Namespace):
  """Keeps names that python gives a meaning out of a namespace."""

  def __init__(*args: Any, **kwargs: Any) -> None:
    self, *rest = args
    jinja2.utils.Namespace.__init__(self)
    for name, value in dict(*rest, **kwargs).items():
      self[name] = value

  def __setitem__(self, name: str, value: Any) -> None:
    if name.startswith("_"):
      raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with _")
    super().__setitem__(name, value)


def _dict(*args: Any, **kwargs: Any) -> dict:
  return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
  raise jinja2.exceptions.TemplateError(message)


def _tojson(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """JSON as transformers writes it: jinja's own filter escapes HTML."""
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """The sandbox, with every loop and call counted."""

  intercepted_binops = frozenset(["*", "**"])

  def __init__(self) -> None:
    super().__init__(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    self.filters |= {"tojson": _tojson, "_counted": _counted}
    self.globals |= {"dict": _dict, "namespace": _Namespace, "raise_exception": _raise_exception}
    del self.globals["lipsum"]  # no template needs it, and its functions reach far

  def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
    tree = super()._parse(source, name, filename)
    for loop in tree.find_all(jinja2.nodes.For):
      # A filter: no assignment in the template can shadow it.
      loop.iter = jinja2.nodes.Filter(loop.iter, "_counted", [], [], None, None)
    return tree

  def call(self, /, *args: Any, **kwargs: Any) -> Any:
    _step()
    return super().call(*args, **kwargs)

  def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
    # One operation of python must stay small: nothing can stop it half-way.
    size = len(left) if isinstance(left, str) else abs(left)
    if size > 1 << 20 or abs(right) > (64 if operator == "**" else 4096):
      raise jinja2.exceptions.SecurityError(f"{operator} of large values")
    return super().call_binop(context, operator, left, right)


def _plain(value: Any) -> Any:
  """A copy of JSON data made of python's own types: a template sees no other methods."""
  if value is None or type(value) in (bool, int, float, str):
    return value
  if isinstance(value, Mapping):
    return {_plain(k): _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  raise ValueError(f"messages, tools and variables hold JSON data, not {type(value).__name__}")


def _message(message: Any) -> dict:
  """One message as transformers hands it over: no None, and the reasoning under both its names."""
  if not isinstance(message, Mapping):
    raise ValueError(f"a message is a mapping, got {type(message).__name__}")
  message = {k: v for k, v in _plain(message).items() if v is not None}
  reasoning = next((message[k] for k in _REASONING if k in message), None)
  if reasoning is None:
    return message
  return {"thinking": reasoning, **message, "reasoning_content": reasoning}


class ChatTemplate:
  """A compiled template."""

  def __init__(self, source: str, clock: Callable[[], datetime.datetime] = datetime.datetime.now):
    """Compiles `source`; `clock` is what `strftime_now` formats.

    Raises:
      ValueError: it is too long or no jinja template.
    """
    if len(source) > MAX_SOURCE:
      raise ValueError(f"chat template of {len(source)} characters, at most {MAX_SOURCE} may be")
    environment = _Environment()
    environment.globals["strftime_now"] = lambda format: clock().strftime(format)
    try:
      self._template = environment.from_string(source)
    except (jinja2.TemplateError, RecursionError, SyntaxError) as e:
      raise ValueError(f"chat template: {e}") from None

  def render(
    self,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
  ) -> str:
    """The conversation as text.

    Args:
      messages: role, content, tool_calls, ... as the template asks.
      tools: JSON schemas of the tools, or None.
      add_generation_prompt: whether to end with the opening of the model's next reply.
      **variables: what else the template reads; `Tokenizer.template_variables` at least.
    Raises:
      ValueError: there are no messages, the template refuses or fails, or exceeds a limit.
    """
    if not messages:
      raise ValueError("a chat template needs at least one message")
    data = {
      **_plain(variables),
      "messages": [_message(m) for m in messages],
      "tools": _plain(tools),
      "documents": None,
      "add_generation_prompt": add_generation_prompt,
    }
    out: list[str] = []
    size = 0
    token = _steps.set([MAX_STEPS])
    try:
      for piece in self._template.generate(data):
        size += len(piece)
        if size > MAX_OUTPUT:
          raise ValueError(f"more than {MAX_OUTPUT} characters")
        out.append(piece)
    except Exception as e:  # whatever the template does, the caller sees one kind of error
      raise ValueError(f"chat template: {e or type(e).__name__}") from None
    finally:
      _steps.reset(token)
    return "".join(out)


def _strings(value: Any) -> Iterator[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, dict):
    for pair in value.items():
      yield from _strings(list(pair))
  elif isinstance(value, list):
    for v in value:
      yield from _strings(v)


def _marked(value: Any, pattern: re.Pattern, mark: str) -> Any:
  """`value` with the mark inside every match of `pattern` in its strings."""
  if isinstance(value, str):
    while pattern.search(value):  # marking one can leave another that overlapped it
      value = pattern.sub(lambda m: m[0][0] + mark + m[0][1:], value)
    return value
  if isinstance(value, dict):
    return {_marked(k, pattern, mark): _marked(v, pattern, mark) for k, v in value.items()}
  if isinstance(value, list):
    return [_marked(v, pattern, mark) for v in value]
  return value


def _pattern(contents: Iterable[str]) -> re.Pattern:
  longest_first = sorted(contents, key=len, reverse=True)
  return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> ChatTemplate:
  return ChatTemplate(source)


def chat_template(tokenizer: Tokenizer, tools: Any = None) -> ChatTemplate:
  """The tokenizer's template: "tool_use" where it has one and there are tools, else "default".

  Raises:
    ValueError: it has none, or a broken one.
  """
  sources = tokenizer.chat_templates
  name = "tool_use" if tools and "tool_use" in sources else "default"
  if name not in sources:
    raise ValueError(f"the {tokenizer.kind} tokenizer has no chat template")
  return _compile(sources[name])


def render_chat(
  tokenizer: Tokenizer,
  messages: Sequence[Mapping[str, Any]],
  tools: Sequence[Mapping[str, Any]] | None = None,
  add_generation_prompt: bool = False,
  **variables: Any,
) -> str:
  """The conversation as text by the tokenizer's own template; see `ChatTemplate.render`."""
  variables = {**tokenizer.template_variables, **variables}
  template = chat_template(tokenizer, tools)
  return template.render(messages, tools, add_generation_prompt, **variables)


def encode_chat(
  tokenizer: Tokenizer,
  messages: Sequence[Mapping[str, Any]],
  tools: Sequence[Mapping[str, Any]] | None = None,
  add_generation_prompt: bool = False,
  *,
  after: str = "",
  **variables: Any,
) -> list[int]:
  """The conversation as token ids: specials of the template are ids, those in messages are text.

  Choice: markup ("<think>", "<tool_call>") in the content of assistant messages stays markup, as it
  is the model's own; everywhere else, tool output included, it is text. This is for contexts that
  are built from messages; tokens that a policy sampled are never rendered and encoded again.

  Args: as `render_chat`, and
    after: only what follows this text, where it stands first.
  Returns:
    ids; those of transformers' `apply_chat_template` where no message contains a special.
  Raises:
    ValueError: as `render_chat`, or the template changes specials of messages while it renders, or
      `after` is not there.
  """
  plain = render_chat(tokenizer, messages, tools, add_generation_prompt, **variables)
  given, tools, variables = [_message(m) for m in messages], _plain(tools), _plain(variables)
  marked, mark = plain, ""
  if any(map(_pattern(tokenizer.specials).search, _strings([given, tools, variables]))):
    marked, mark = _render_marked(tokenizer, given, tools, add_generation_prompt, variables, plain)
  if after:
    _, found, marked = marked.partition(after)  # later ones are what somebody said
    if not found:
      raise ValueError(f"the chat template does not render {after!r}")
  return _encode_markup(tokenizer, marked, mark)


def _render_marked(
  tokenizer: Tokenizer,
  messages: list[dict],
  tools: Any,
  add_generation_prompt: bool,
  variables: dict[str, Any],
  plain: str,
) -> tuple[str, str]:
  """The rendering with a mark in every special of a message, and the mark; see the module."""
  mark = _absent([*_strings([messages, tools, variables, plain, list(tokenizer.specials)])])
  all_specials = _pattern(tokenizer.specials)
  strict = _pattern(tokenizer.specials.keys() - tokenizer.markup)
  inside = []
  for message in messages:
    own = ("content", *_REASONING) if message.get("role") == "assistant" else ()
    inside.append(
      {k: _marked(v, strict if k in own else all_specials, mark) for k, v in message.items()}
    )
  marked = render_chat(
    tokenizer,
    inside,
    _marked(tools, all_specials, mark),
    add_generation_prompt,
    **_marked(variables, all_specials, mark),
  )
  if marked.replace(mark, "") != plain:
    raise ValueError(
      "the chat template changes special tokens in messages: they cannot be kept as text"
    )
  return marked, mark


def _absent(texts: Sequence[str]) -> str:
  """One or two private characters that stand nowhere in the texts."""
  used = set().union(*texts)
  if one := next((c for c in _PRIVATE if c not in used), ""):
    return one
  pairs = set().union(*(zip(text, text[1:], strict=False) for text in texts))
  return "".join(next(pair for pair in itertools.product(_PRIVATE, repeat=2) if pair not in pairs))


def _encode_markup(tokenizer: Tokenizer, text: str, mark: str) -> list[int]:
  """Ids of a rendering in which specials are specials, but for those with the mark in them."""
  ids: list[int] = []
  at = 0
  for found in _pattern(tokenizer.specials).finditer(text):
    # Some tokens take the white space beside them along.
    before, after = text[at : found.start()], found.end()
    if found[0] in tokenizer.strips_left:
      before = before.rstrip()
    if found[0] in tokenizer.strips_right:
      after += len(text[after:]) - len(text[after:].lstrip())
    ids += tokenizer.encode(before.replace(mark, ""))
    ids.append(tokenizer.specials[found[0]])
    at = after
  return ids + tokenizer.encode(text[at:].replace(mark, ""))
