"""The tokenizer built without torch, against the one `transformers` builds with torch, on real text."""

import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from stable_lora_jax.data import TASKS, load_task, load_tokenizer, smollm2_gguf

ODD = [
    "",
    " ",
    "\n\n\n",
    "a  b   c    d",
    " lead and trail ",
    "2012 and 3.14159, 1,000,000",
    "naïve café — “quoted” … 漢字かな 한국어 Ελληνικά עברית",
    "👩‍👩‍👧 emoji 🎉🎉",
    "e\u0301 combining, zero\u200bwidth, nbsp\u00a0here",
    "def f(x):\n\treturn {k: v**2 for k, v in x.items()}  # why?\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <repo_name>x",
    "it's we'll I'D they'RE",
    "\x00\x07\u2028",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 20,
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """About 2500 questions and their choices from all five tasks."""
    questions = [question for name in TASKS for question in load_task(name, "validation")[::5][:500]]
    return [text for question in questions for text in (question.question, *(f" {c}" for c in question.choices))]


def test_equals_the_torch_route(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    path = smollm2_gguf()
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert len(texts) > 2000
    for text in texts + ODD:
        assert tokenizer.encode(text) == reference.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "unk_token_id", "chat_template", "vocab_size"):
        assert getattr(tokenizer, name) == getattr(reference, name), name
    assert tokenizer.get_vocab() == reference.get_vocab()


def test_digits_are_cut_before_spaces(tokenizer: PreTrainedTokenizerBase) -> None:
    # Here the torch route gives "Ġ", "Ġ": it knows no rule `smollm` (see the module's docstring).
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a  42")) == ["a", "ĠĠ", "4", "2"]


def test_interface(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.decode(tokenizer.encode("Paris is <|im_end|>"), skip_special_tokens=True) == "Paris is "
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert str(chat).endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n")
    assert tokenizer.model_max_length == 8192


def test_folder(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, texts: list[str]) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert all(loaded.encode(text) == tokenizer.encode(text) for text in texts[:500] + ODD)


@pytest.mark.parametrize(("model", "pre"), [("gpt2", "mystery"), ("llama", "smollm")])
def test_unknown_kind(tmp_path: Path, model: str, pre: str) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    wrong = "tokenizer.ggml.pre = 'mystery'; supported: smollm." if pre == "mystery" else "supported: gpt2."
    with pytest.raises(ValueError, match=rf"x.gguf says .*{re.escape(wrong)} Load the tokenizer of this model from"):
        load_tokenizer(path)


def test_missing_file_and_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no GGUF file .*none\.gguf; give the path of an existing file"):
        load_tokenizer(tmp_path / "none.gguf")
    with pytest.raises(OSError, match=r"no tokenizer 'nobody/nothing': .*Allowed are a folder .* or 'smollm2-135m'"):
        load_tokenizer("nobody/nothing")
