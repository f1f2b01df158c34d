"""Damages files that are read from outside, at random but repeatably, and lets each reader at them.

A reader returns a result or raises an error with a message (ValueError, OSError); anything else is a finding. For long
runs:

    python -m tests.fuzzing --minutes 60 [reader ...]
"""

import argparse
import dataclasses
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stable_lora_jax.assets.gguf_metadata import read_gguf_metadata
from stable_lora_jax.data import load_jsonl
from stable_lora_jax.lora import inject_lora, inject_peft, load_adapter, read_adapter_spec, save_adapter, save_peft
from stable_lora_jax.models import config_from_hf, huggingface_module
from stable_lora_jax.models.gguf import open_gguf
from stable_lora_jax.models.huggingface import open_huggingface, read_json
from stable_lora_jax.training import RunDirectory, read_metrics
from tests.models import tiny

ALLOWED = (ValueError, OSError)
MEMORY = 6 << 30  # bytes of address space beyond what is in use; a reader has no need of more than its file
INTERESTING = [0, 1, 7, 8, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**62, 2**63 - 1, 2**64 - 1]
WORDS = [
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"[]",
    b"{}",
    b'"x"',
    b"9" * 30,
    b"\xff",
    b"\x00",
    b"\xed\xa0\x80",
]


def damage(rng: np.random.Generator, data: bytes) -> bytes:
    """Returns the bytes with one to four changes."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not out:
            return bytes(out)
        # The header is where structure is.
        span = len(out) if rng.random() < 0.3 else min(len(out), 600)
        at = int(rng.integers(span))
        kind = rng.integers(6)
        if kind == 0:
            out[at] = rng.integers(256)
        elif kind == 1:
            out[at] ^= 1 << rng.integers(8)
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            size = int(rng.choice([1, 4, 8]))
            value = INTERESTING[rng.integers(len(INTERESTING))] % (1 << (8 * size))
            out[at : at + size] = value.to_bytes(size, "little")
        elif kind == 4:
            stop = at + int(rng.integers(1, 40))
            out[at:at] = out[at:stop] * int(rng.integers(1, 4))
        else:
            word = WORDS[rng.integers(len(WORDS))]
            out[at : at + len(word)] = word
    return bytes(out)


def damage_json(rng: np.random.Generator, data: bytes) -> bytes:
    """Returns JSON with a few values replaced by others, or damaged bytes."""
    if rng.random() < 0.4:
        return damage(rng, data)
    values = [None, True, False, 0, -1, 1.5, 1e308, "", "x", "4", [], {}, [1], {"a": 1}, [[]], 10**400, "é" * 50]
    record = json.loads(data)

    def change(node: object, depth: int) -> object:
        if isinstance(node, dict) and node and (depth == 0 or rng.random() < 0.7):
            key = list(node)[rng.integers(len(node))]
            if rng.random() < 0.1:
                return {name: value for name, value in node.items() if name != key}
            return node | {key: change(node[key], depth + 1)}
        if isinstance(node, list) and node and rng.random() < 0.7:
            at = int(rng.integers(len(node)))
            return [*node[:at], change(node[at], depth + 1), *node[at + 1 :]]
        return values[rng.integers(len(values))]

    for _ in range(rng.integers(1, 4)):
        record = change(record, 0)
    return json.dumps(record).encode()


@dataclasses.dataclass(frozen=True)
class Reader:
    """A file that is damaged, and what then reads its directory."""

    file: Path
    damage: Callable[[np.random.Generator, bytes], bytes]
    read: Callable[[], object]


def readers(directory: Path) -> dict[str, Reader]:
    """Returns every reader by name, with whole files of its own below `directory`."""
    model = tiny.decoder()
    inject_lora(model, 2, 4.0, "qv", rngs=nnx.Rngs(0))
    adapter, peft, run = directory / "adapter.safetensors", directory / "peft", directory / "run"
    save_adapter(adapter, model, "tiny")
    save_peft(peft, model, "tiny", huggingface_module)
    base = directory / "base"
    base.mkdir()
    tiny.save(
        base, tiny.CONFIG, tiny.hf_tensors(tiny.decoder()), model_type="llama", rope_scaling={"rope_type": "default"}
    )
    run.mkdir()
    (run / "config.json").write_text(
        json.dumps({"config": {"rank": 2, "model": "x"}, "total_steps": 3, "commit": None})
    )
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 1.0}\n{"step": 2, "pair": "q", "index": [0], "stable": true}\n'
    )
    lines = directory / "data.jsonl"
    lines.write_text('{"question": "q é", "choices": ["a", "b"], "answer_index": 0}\n' * 2)
    weights = directory / "model.gguf"
    writer = gguf.GGUFWriter(weights, "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def resume() -> object:
        wanted, asked = {"adapter": {"rank": 2}}, {"resume": True, "auto_resume": False, "overwrite": False}
        return RunDirectory(run).resumes(wanted, {"total_steps": 3}, **asked)

    def load() -> object:
        fresh = inject_lora(tiny.decoder(), 2, 4.0, "qv", rngs=nnx.Rngs(1))
        return load_adapter(adapter, fresh, "tiny")

    def inject() -> object:
        return inject_peft(peft, tiny.decoder(), "tiny", huggingface_module)

    return {
        "adapter header": Reader(adapter, damage, lambda: read_adapter_spec(adapter)),
        "adapter": Reader(adapter, damage, load),
        "PEFT configuration": Reader(peft / "adapter_config.json", damage_json, inject),
        "PEFT weights": Reader(peft / "adapter_model.safetensors", damage, inject),
        "model configuration": Reader(
            base / "config.json", damage_json, lambda: config_from_hf(read_json(base / "config.json"))
        ),
        "model weights": Reader(base / "model.safetensors", damage, lambda: open_huggingface(base)),
        "run configuration": Reader(run / "config.json", damage_json, resume),
        "metrics": Reader(run / "metrics.jsonl", damage, lambda: read_metrics(run / "metrics.jsonl")),
        "JSONL": Reader(lines, damage, lambda: load_jsonl(lines)),
        "GGUF metadata": Reader(weights, damage, lambda: read_gguf_metadata(weights)),
        "GGUF": Reader(weights, damage, lambda: open_gguf(weights)),
    }


def fuzz(reader: Reader, seed: int, whole: bytes) -> None:
    """Damages the file by a seed and reads it; raises what is no allowed error, with the seed."""
    reader.file.write_bytes(reader.damage(np.random.default_rng(seed), whole))
    try:
        reader.read()
    except ALLOWED as error:
        if not str(error).strip():
            raise AssertionError(f"seed {seed}: {type(error).__name__} without a message") from error
    except BaseException as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {str(error)[:200]}") from error


def limit_memory() -> None:
    """Lets this process take little more memory than it has, so that a reader that believes a length fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> None:
    """Fuzzes in turns until the time is over, and tells each kind of finding once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = {n: r for n, r in readers(Path(folder)).items() if not options.names or n in options.names}
        wholes = {name: reader.file.read_bytes() for name, reader in chosen.items()}
        jnp.zeros(()).block_until_ready()
        limit_memory()
        end, seed, found, tried = time.monotonic() + 60 * options.minutes, options.seed, set(), dict.fromkeys(chosen, 0)
        while time.monotonic() < end:
            for name, reader in chosen.items():
                until = time.monotonic() + 2
                while time.monotonic() < until:
                    seed += 1
                    tried[name] += 1
                    try:
                        fuzz(reader, seed, wholes[name])
                    except AssertionError as error:
                        kind = (name, str(error).partition(": ")[2][:60])
                        if kind not in found:
                            found.add(kind)
                            print(name, error, flush=True)
                reader.file.write_bytes(wholes[name])
                if options.verbose:
                    print(
                        name, tried[name], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, "MiB", flush=True
                    )
        print(f"{tried}; {len(found)} kinds of findings")


if __name__ == "__main__":
    main()
