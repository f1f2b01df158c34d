"""Readers of files from outside: an error with a message, or a result, whatever is in the file (see `fuzzing`)."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import fuzzing

SLOW = {"adapter": 30, "PEFT configuration": 100, "PEFT weights": 100}  # each builds a model


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzzing.Reader]:
    return fuzzing.readers(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "name",
    [
        *("adapter header", "adapter", "PEFT configuration", "PEFT weights", "model configuration", "model weights"),
        *("run configuration", "metrics", "JSONL", "GGUF metadata", "GGUF"),
    ],
)
def test_a_damaged_file_is_an_error_with_a_message(readers: dict[str, fuzzing.Reader], name: str) -> None:
    reader = readers[name]
    whole = reader.file.read_bytes()
    for seed in range(SLOW.get(name, 500)):
        fuzzing.fuzz(reader, seed, whole)
    reader.file.write_bytes(whole)


def test_a_length_that_a_header_claims_is_not_believed(tmp_path: Path) -> None:
    # In a process of its own, which may not take more memory than it has.
    code = """if True:
        import struct, sys
        from pathlib import Path
        from tests import fuzzing
        from stable_lora_jax.models.gguf import open_gguf
        fuzzing.MEMORY = 1 << 28
        fuzzing.limit_memory()
        for claimed in (2**31, 2**40, 2**62):
            for count in (claimed, 1):
                key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 5, claimed)
                Path(sys.argv[1]).write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, count) + key)
                try:
                    open_gguf(Path(sys.argv[1]))
                except ValueError as error:
                    print(error)
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x.gguf"], capture_output=True, text=True, check=True)
    assert done.stdout.count("damaged or cut header (it claims") == 6, done.stdout
