"""Where tokenizers come from, and the check against a model's vocabulary."""

import json
import pathlib
import shutil

import pytest

from rome.text import ByteTokenizer, Tokenizer, check_vocabulary
from tests.pretrained import smollm2_gguf

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "tokenizer"


def test_a_directory_says_which_kind_it_holds(tmp_path):
  ByteTokenizer().save(tmp_path)
  assert type(Tokenizer.from_dir(tmp_path)) is ByteTokenizer
  assert Tokenizer.from_dir(GOLDEN).kind == "BPE"
  assert Tokenizer.from_dir(smollm2_gguf()).vocab_size == 49_152


def test_no_tokenizer_or_two_of_them(tmp_path):
  with pytest.raises(ValueError, match="has neither: want one of rome_tokenizer.json, tokenizer.j"):
    Tokenizer.from_dir(tmp_path)
  ByteTokenizer().save(tmp_path)
  shutil.copy(GOLDEN / "tokenizer.json", tmp_path)
  with pytest.raises(ValueError, match="has rome_tokenizer.json and tokenizer.json"):
    Tokenizer.from_dir(tmp_path)
  with pytest.raises(ValueError, match="none.gguf: no usable GGUF file"):
    Tokenizer.from_dir(tmp_path / "none.gguf")


def test_the_byte_tokenizer_has_the_interface():
  t = ByteTokenizer()
  assert (t.bos_id, t.eos_id) == (257, 263)
  assert t.specials == {
    **{"<|pad|>": 256, "<|bos|>": 257, "<|system|>": 258, "<|user|>": 259},
    **{"<|assistant|>": 260, "<|tool|>": 261, "<|call|>": 262, "<|end|>": 263},
  }
  assert all(t.decode([i]) == content for content, i in t.specials.items())
  assert not t.template_variables and t.markup == {"<|call|>"}


@pytest.mark.parametrize("rows", [264, 265, 264 + 1024])
def test_padding_is_no_mismatch(rows):
  check_vocabulary(ByteTokenizer(), rows)


@pytest.mark.parametrize("rows", [1, 263, 264 + 1025, 49_152])
def test_a_mismatch_is_a_named_error(rows):
  message = f"mismatch: the byte tokenizer has 264 ids, the model {rows}"
  with pytest.raises(ValueError, match=message):
    check_vocabulary(ByteTokenizer(), rows)


@pytest.mark.parametrize(
  "content", ["", "[", "[]", "{}", "[" * 100_000, '{"model": 1}', '{"added_tokens": [1]}']
)
def test_damaged_files_are_named_errors(content, tmp_path):
  file = tmp_path / "tokenizer.json"
  file.write_text(content)
  with pytest.raises(ValueError, match=str(tmp_path)):
    Tokenizer.from_dir(tmp_path)
  spec = json.loads((GOLDEN / "tokenizer.json").read_text())
  file.write_text(json.dumps(spec))
  (tmp_path / "tokenizer_config.json").write_text(content or "[")
  if content != "{}" and '{"' not in content:
    with pytest.raises(ValueError, match=str(tmp_path)):
      Tokenizer.from_dir(tmp_path)
