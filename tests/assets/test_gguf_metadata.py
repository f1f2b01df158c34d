"""The small header reader against the `gguf` package, and its errors."""

import struct
from pathlib import Path

import pytest

from stable_lora_jax.assets.gguf_metadata import read_gguf_metadata
from stable_lora_jax.assets.packaged import smollm2_gguf


def test_equals_the_gguf_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "every-type.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 7)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "naïve 漢字")
    writer.add_array("a.strings", ["x", "", "ü"])
    writer.add_array("a.floats", [0.5, -1.25])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(path).fields
    expected = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    assert len(expected) == 15
    assert read_gguf_metadata(path) == expected


def test_the_real_file() -> None:
    metadata = read_gguf_metadata(smollm2_gguf())
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 30
    assert len(metadata["tokenizer.ggml.tokens"]) == 49152


def test_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(ValueError, match=r"begins with b'PK\\x03\\x04'.*only GGUF files of version 2 and 3"):
        read_gguf_metadata(path)
    with smollm2_gguf().open("rb") as whole:
        start = whole.read(5000)
    for damaged in (start, start[:12], start[:24] + b"\xff" * 8, start[:24] + b"\xff" * 7 + b"\x7f"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"has a damaged or cut header .*; fetch the file again"):
            read_gguf_metadata(path)
    path.write_bytes(struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"k", 99))
    with pytest.raises(ValueError, match=r"value type 99 is not known; known are 0 to 12"):
        read_gguf_metadata(path)
