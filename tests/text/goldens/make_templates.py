"""Goldens of chat templates by Hugging Face transformers: tokenizer/ and templates.json here.

The templates are this project's own, in the manner of well-known families; the tokenizer is trained
here, on the conversations below. Needs an environment of its own:
  python3 -m venv VENV && VENV/bin/pip install transformers==5.23.0
  VENV/bin/python tests/text/goldens/make_templates.py
"""

import itertools
import json
import pathlib

import tokenizers
import transformers

HERE = pathlib.Path(__file__).parent
SPECIAL = [
  *("<|begin|>", "<|im_start|>", "<|im_end|>"),
  *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]
MARKUP = [f"<{end}{tag}>" for tag in ("think", "tool_call", "tool_response") for end in ("", "/")]
DATE = {"date_string": "26 Jul 2025"}

TOOLS = [
  {
    "type": "function",
    "function": {
      "name": "run",
      "description": 'Runs a shell command; "quotes", <tags> & ümlauts arrive as they are.',
      "parameters": {
        "type": "object",
        "properties": {
          "command": {"type": "string", "description": "What to run"},
          "timeout": {"type": "number", "default": 1.5},
        },
        "required": ["command"],
      },
    },
  },
  {
    "type": "function",
    "function": {
      "name": "submit",
      "description": "Ends the task.",
      "parameters": {"type": "object", "properties": {}},
    },
  },
]


def call(name: str, arguments: dict | str, index: int = 0) -> dict:
  function = {"name": name, "arguments": arguments}
  return {"id": f"call_{index}", "type": "function", "function": function}


PLAIN = [
  {"role": "user", "content": "  Hello, what's 12345 + 678?\n"},
  {"role": "assistant", "content": "13023.  "},
  {"role": "user", "content": "Größe in 東京 🚀: e\u0301 and\ttabs\r\n"},
]
SYSTEM = [{"role": "system", "content": "Be brief.\n\n- no <b>HTML</b> & co."}, *PLAIN]
TOOL_TURNS = [
  {"role": "system", "content": "You use a shell."},
  {"role": "user", "content": "How many lines has a.txt?"},
  {
    "role": "assistant",
    "content": "",
    "tool_calls": [call("run", {"command": "wc -l a.txt | awk '{print $1}'", "timeout": 2})],
  },
  {"role": "tool", "tool_call_id": "call_0", "content": '{"exit": 0, "output": "17\\n"}'},
  {"role": "assistant", "content": "It has 17 lines."},
  {"role": "user", "content": "Thanks. Finish."},
]
PENDING = [
  *TOOL_TURNS,
  {"role": "assistant", "content": None, "tool_calls": [call("submit", {}, 1)]},
  {"role": "tool", "tool_call_id": "call_1", "content": "done: naïve “quotes” \\ back\\nslash"},
]
TWO_CALLS = [
  {"role": "user", "content": "Compare a and b."},
  {
    "role": "assistant",
    "content": "Both at once.",
    "tool_calls": [call("run", {"command": "cat a"}, 0), call("run", '{"command": "cat b"}', 1)],
  },
  {"role": "tool", "content": "1"},
  {"role": "tool", "content": "2"},
]
THOUGHTS = [
  {"role": "user", "content": "Is 91 prime?"},
  {"role": "assistant", "content": "<think>\n91 = 7 * 13\n</think>\n\nNo."},
  {"role": "user", "content": "And 97?"},
  {
    "role": "assistant",
    "content": "",
    "reasoning_content": "Let me check\nby a tool.",
    "tool_calls": [call("run", {"command": "factor 97"})],
  },
  {"role": "tool", "content": "97: 97"},
  {"role": "assistant", "content": "<think>\n97 is prime\n</think>\n\nYes."},
]

# template -> conversations; each is rendered with and without tools and generation prompt.
CASES = {
  "chatml_tools": {
    "plain": PLAIN,
    "system": SYSTEM,
    "tools": TOOL_TURNS,
    "pending": PENDING,
    "two": TWO_CALLS,
  },
  "headers": {"plain": PLAIN, "system": SYSTEM, "tools": TOOL_TURNS, "pending": PENDING},
  "thinking": {
    "plain": PLAIN,
    "system": SYSTEM,
    "tools": TOOL_TURNS,
    "pending": PENDING,
    "two": TWO_CALLS,
    "thoughts": THOUGHTS,
  },
  "brackets": {"plain": PLAIN, "system": SYSTEM, "tools": TOOL_TURNS, "pending": PENDING},
}
VARIABLES = {"headers": [DATE], "thinking": [{}, {"enable_thinking": False}]}


def train() -> transformers.PreTrainedTokenizerFast:
  """Byte-level BPE: every byte, merges of the conversations, special tokens and markup."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.normalizer = tokenizers.normalizers.NFC()
  split = tokenizers.Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
  )
  level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [tokenizers.pre_tokenizers.Split(split, "isolated"), level]
  )
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=600, show_progress=False, initial_alphabet=level.alphabet(), min_frequency=2
  )
  texts = [json.dumps([c, TOOLS], ensure_ascii=False) for t in CASES.values() for c in t.values()]
  model.train_from_iterator(texts, trainer)
  model.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in SPECIAL])
  model.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in MARKUP])
  model.add_tokens([tokenizers.AddedToken(" " * 8, normalized=False)])
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=model, bos_token="<|begin|>", eos_token="<|im_end|>"
  )


def main() -> None:
  tokenizer = train()
  tokenizer.save_pretrained(HERE / "tokenizer")
  goldens = []
  for template, chats in CASES.items():
    tokenizer.chat_template = (HERE / "templates" / f"{template}.jinja").read_text()
    variants = VARIABLES.get(template, [{}])
    asks = itertools.product(chats.items(), [None, TOOLS], [False, True], variants)
    for (chat, messages), tools, prompt, variables in asks:
      args = {"tools": tools, "add_generation_prompt": prompt, **variables}
      goldens.append(
        {
          "template": template,
          "chat": chat,
          "tools": tools is not None,
          "add_generation_prompt": prompt,
          "variables": variables,
          "text": tokenizer.apply_chat_template(messages, tokenize=False, **args),
          "ids": tokenizer.apply_chat_template(messages, return_dict=False, **args),
        }
      )
  conversations = {name: c for chats in CASES.values() for name, c in chats.items()}
  lines = ",\n".join(json.dumps(g, ensure_ascii=False) for g in goldens)
  heads = [
    f'"{name}": {json.dumps(value, ensure_ascii=False)}'
    for name, value in {"tools": TOOLS, "conversations": conversations}.items()
  ]
  content = ",\n".join([*heads, f'"goldens": [\n{lines}\n]'])
  (HERE / "templates.json").write_text(f"{{\n{content}\n}}\n")
  print(f"{len(goldens)} goldens, {len(tokenizer)} ids")


if __name__ == "__main__":
  main()
