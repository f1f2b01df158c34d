"""Chat templates are programs from outside: right text, or one message that names the template."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from stable_lora_jax.data import SMOLLM2, ChatTemplateError, load_tokenizer, render_chat

SAID = [{"role": "user", "content": "hi"}]


@pytest.fixture
def own(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> PreTrainedTokenizerBase:
    tokenizer.save_pretrained(tmp_path)
    return load_tokenizer(tmp_path)


def test_the_models_own_template(tokenizer: PreTrainedTokenizerBase) -> None:
    text = render_chat(tokenizer, SAID)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert render_chat(tokenizer, SAID, add_generation_prompt=False).endswith("hi<|im_end|>\n")


def test_one_of_several_templates(own: PreTrainedTokenizerBase) -> None:
    own.chat_template = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ messages[0].content }}"}
    assert render_chat(own, SAID) == "Dhi"
    assert render_chat(own, SAID, template="tool_use") == "Thi"
    with pytest.raises(ChatTemplateError, match=r"no chat template 'rag'; it has 'default', 'tool_use'. Name one of"):
        render_chat(own, SAID, template="rag")
    own.chat_template = {"rag": "R", "tool_use": "T"}
    with pytest.raises(ChatTemplateError, match=r"several chat templates and none is called 'default'; it has 'rag'"):
        render_chat(own, SAID)
    own.chat_template = None
    with pytest.raises(ChatTemplateError, match=r"has no chat template. Give the text as it should be"):
        render_chat(own, SAID)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }", r"fails: TemplateSyntaxError: unexpected '}'"),
        ("{{ raise_exception('roles must alternate') }}", r"fails: TemplateError: roles must alternate. Correct the"),
        ("{{ messages[0].tool.name }}", r"fails: UndefinedError: 'dict object' has no attribute 'tool'"),
        ("{{ messages[0].content + 1 }}", r"fails: TypeError: can only concatenate str"),
        ("{{ 1 // 0 }}", r"fails: ZeroDivisionError"),
        ("{% if false %}x{% endif %}", r"gives '' instead of a text"),
        ("{{ messages.__class__.__mro__ }}", r"fails: SecurityError"),
    ],
)
def test_a_template_that_fails_is_named(own: PreTrainedTokenizerBase, template: str, message: str) -> None:
    own.chat_template = template
    with pytest.raises(ChatTemplateError, match=rf"the chat template of .*{message}"):
        render_chat(own, SAID)


def test_code_that_comes_with_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    load_tokenizer(SMOLLM2).save_pretrained(tmp_path)
    marker = tmp_path / "it-ran"
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Mine: ...\n")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name in ("tokenizer_config.json", "config.json"):
        own = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", "code.Mine"]}}
        (tmp_path / name).write_text(json.dumps({**config, **own}))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"comes with Python code of its own, which is not run here. Save it once as a"
    ):
        load_tokenizer(tmp_path)
    assert not marker.exists()
