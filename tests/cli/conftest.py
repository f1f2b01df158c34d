"""A tiny model with a byte-level tokenizer in one directory, and questions of one length."""

import json
from pathlib import Path

import pytest

from tests.models import tiny


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    return tiny.save_with_tokenizer(tmp_path_factory.mktemp("model"))


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
