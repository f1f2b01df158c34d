"""A tiny model with a byte-level tokenizer in one directory, and questions of one length."""

import json
from pathlib import Path

import pytest

from tests.models import tiny


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("model")
    changes = {"vocab_size": 260, "max_positions": 256}
    tiny.save(
        *(directory, tiny.config(**changes), tiny.hf_tensors(tiny.decoder(**changes))),
        model_type="llama",
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    records = [
        {"question": f"{i}+{j}?", "choices": [f"{i + j:02}", f"{i + j + 1:02}"], "answer_index": 0}
        for i in range(4)
        for j in range(6)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file
