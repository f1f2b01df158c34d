"""Conversations: the assistant's tokens are learnt, as transformers' and TRL's masks say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from stable_lora_jax.data import (
    ChatTemplateError,
    Conversation,
    Encoded,
    PackedBatches,
    digest,
    encode_all,
    load_jsonl,
    load_tokenizer,
    make_batch,
    right_branch_only,
)

SINGLE = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *SINGLE]
SEVERAL = [
    *SINGLE,
    {"role": "user", "content": " And 3?\n"},
    {"role": "assistant", "content": "It is 4. No: 6.\n\nOk?"},
]
OPENED = [{"role": "assistant", "content": "Hello, ask me."}, *SEVERAL]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]
CALLING = [
    SINGLE[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture
def own(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> PreTrainedTokenizerBase:
    tokenizer.save_pretrained(tmp_path)
    return load_tokenizer(tmp_path)


def encode(tokenizer: Any, messages: Any, tools: Any = ()) -> Encoded:
    (encoded,) = encode_all(tokenizer, [Conversation(tuple(messages), tuple(tools))])
    return encoded


def mask_of(encoded: Encoded) -> tuple[list[int], list[int]]:
    """Returns the tokens up to the last that is learnt, and which are."""
    (branch,), learnt = encoded.branches, encoded.learnt or (True,) * len(encoded.branches[0])
    return [*encoded.prefix, *branch], [0] * len(encoded.prefix) + list(map(int, learnt))


def learnt_text(tokenizer: Any, encoded: Encoded) -> str:
    tokens, mask = mask_of(encoded)
    return tokenizer.decode([token for token, each in zip(tokens, mask, strict=True) if each])


def expected_mask(
    tokenizer: Any, messages: Any, template: Any = None, tools: Any = None
) -> tuple[list[int], list[int]]:
    found = tokenizer.apply_chat_template(
        *(messages,), tools=tools, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = list(map(int, found["assistant_masks"]))
    last = max(index for index, each in enumerate(mask) if each) + 1
    return found["input_ids"][:last], mask[:last]


@pytest.mark.parametrize("messages", [SINGLE, SYSTEM, SEVERAL], ids=["single", "system", "several"])
def test_of_the_models_own_template(tokenizer: PreTrainedTokenizerBase, messages: Any) -> None:
    encoded = encode(tokenizer, messages)
    tokens, _ = mask_of(encoded)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == tokenizer.decode(tokens)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert learnt_text(tokenizer, encoded) == "".join(f"{answer}<|im_end|>\n" for answer in answers)


@pytest.mark.parametrize("messages", [SINGLE, SYSTEM, SEVERAL, OPENED], ids=["single", "system", "several", "opened"])
def test_a_template_that_marks_is_believed(own: PreTrainedTokenizerBase, messages: Any) -> None:
    own.chat_template = MARKED
    assert mask_of(encode(own, messages)) == expected_mask(own, messages)
    marked = encode(own, messages)
    own.chat_template = PLAIN
    assert encode(own, messages) == marked


def trl_templates() -> Path:
    utils = pytest.importorskip("trl.chat_template_utils")
    return Path(utils.__file__).parent / "chat_templates"


@pytest.mark.parametrize(
    ("name", "special"),
    [
        ("llama3", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
        ("qwen2_5", []),
        ("qwen3", ["<think>", "</think>", "<tool_call>", "</tool_call>"]),
        ("qwen3_instruct_2507", []),
        ("gemma3", ["<start_of_turn>", "<end_of_turn>"]),
        ("phi3", ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]),
    ],
)
@pytest.mark.parametrize("messages", [SINGLE, SYSTEM, SEVERAL], ids=["single", "system", "several"])
def test_the_mask_is_that_of_trl(own: Any, name: str, special: list[str], messages: Any) -> None:
    own.add_special_tokens({"additional_special_tokens": special})
    training = (trl_templates() / f"{name}_training.jinja").read_text()
    own.chat_template = (trl_templates() / f"{name}.jinja").read_text()
    tokens, mask = mask_of(encode(own, messages))
    whole = own.apply_chat_template(messages, tokenize=False)
    assert own.decode(tokens) == whole[: len(own.decode(tokens))]
    expected_tokens, expected = expected_mask(own, messages, training)
    if name == "qwen2_5":  # TRL counts the newline that ends the header, which the prompt of a generation has
        newline = own.encode("\n")
        for index, token in enumerate(expected_tokens):
            if [token] == newline and expected[index] and not expected[index - 1]:
                expected[index] = 0
    if name == "qwen3" and messages is SEVERAL:  # TRL's text has thoughts in every turn, the model's own in the last
        last = "<think>\n\n</think>\n\nIt is 4. No: 6.\n\nOk?<|im_end|>\n"
        assert learnt_text(own, encode(own, messages)) == f"It is 4.<|im_end|>\n{last}"
        return
    assert tokens == expected_tokens
    assert mask == expected
    own.chat_template = training
    assert mask_of(encode(own, messages)) == expected_mask(own, messages, training)


@pytest.mark.parametrize("name", ["llama3_2", "qwen2_5", "qwen3"])
def test_calls_of_tools(own: Any, name: str) -> None:
    own.chat_template = (trl_templates() / f"{name}.jinja").read_text()
    encoded = encode(own, CALLING, TOOLS)
    learnt = learnt_text(own, encoded)
    assert '"name": "add"' in learnt
    assert "It is 4." in learnt
    assert "Adds." not in learnt
    assert "What is" not in learnt
    assert "Adds." in own.decode(encoded.prefix)


def test_a_file_of_conversations(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    lines = [{"messages": SINGLE}, {"messages": SEVERAL, "tools": TOOLS}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = load_jsonl(file)
    assert items == [Conversation(tuple(SINGLE)), Conversation(tuple(SEVERAL), tuple(TOOLS))]
    assert [item.id for item in items] == ["1", "2"]
    examples = encode_all(tokenizer, items)
    assert right_branch_only(examples[1]) == examples[1]
    assert examples[0].learnt is None  # one turn, learnt to its end
    assert digest(examples) != digest([examples[0], Encoded(examples[1].prefix, examples[1].branches, 0)])


def test_only_what_is_learnt_has_targets(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = encode_all(tokenizer, [Conversation(tuple(each)) for each in (SEVERAL, SINGLE, SYSTEM, SEVERAL)])
    batch = make_batch(examples)
    for row, example in enumerate(examples):
        tokens, mask = mask_of(example)
        real = batch.branch[row] >= 0
        assert real.sum() == example.num_targets == sum(mask)
        assert batch.targets[row][real].tolist() == [token for token, each in zip(tokens, mask, strict=True) if each]
        # Each is read where the token before it stands.
        places = [index - 1 for index, each in enumerate(mask) if each]
        assert batch.read_at[row][real].tolist() == places
        assert batch.tokens[row][: example.length].tolist() == tokens[:-1]
    packed = PackedBatches(examples, batch_size=4, seed=0, max_length=256, num_steps=1)[0]
    assert sorted(packed.targets[packed.branch >= 0]) == sorted(batch.targets[batch.branch >= 0])
    assert np.count_nonzero(packed.branch >= 0) == sum(example.num_targets for example in examples)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": []}, "no message is the assistant's"),
        ({"messages": [SINGLE[0]]}, "no message is the assistant's"),
        ({"messages": "hi"}, "messages is 'hi', not of type list"),
        ({"messages": SINGLE, "prompt": "x"}, "unknown field prompt"),
        ({"messages": ["hi"]}, "message 0 is 'hi', not an object with a role"),
        ({"messages": [{"role": "assistant"}]}, "message 0 has the content None; texts alone"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "message 0 has the content"),
        ({"messages": [SINGLE[1] | {"weight": 0}]}, "message 0 has the unknown field weight"),
        ({"messages": SINGLE, "tools": "add"}, "tools is 'add', not a list of objects"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: Any, message: str) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=rf"chat.jsonl, line 1: .*{message}"):
        load_jsonl(tmp_path / "chat.jsonl")


def test_what_cannot_be_told_is_refused(own: PreTrainedTokenizerBase) -> None:
    own.chat_template = None
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        encode(own, SINGLE)
    own.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ChatTemplateError, match=r"a conversation: the chat template of .* fails"):
        encode(own, SINGLE)
    # A template that says other things while a conversation goes on than at its end.
    own.chat_template = "{{ messages | length }}" + PLAIN
    with pytest.raises(ValueError, match=r"message 1 does not stand in the text of the whole conversation"):
        encode(own, SEVERAL)
    own.chat_template = "{{ messages[0].content }}{% generation %}{% endgeneration %}"
    with pytest.raises(ValueError, match="no token of its text is the assistant's"):
        encode(own, SINGLE)
    own.chat_template = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    with pytest.raises(ValueError, match="its first token is learnt"):
        encode(own, SINGLE)
