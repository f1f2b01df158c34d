"""The smoke test of an experiment: its whole path on a decoder of a few thousand parameters, in seconds.

What is tried is what a long run relies on: cells are trained, scored, written and made into tables; a run killed at 2
steps goes on to 4 and leaves the same adapter, bit by bit, as the uninterrupted one.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from flax import nnx

from experiments.running.cells import Options, cell_of, read_lines, train_cells
from stable_lora_jax.models import Decoder, DecoderConfig, save_huggingface
from stable_lora_jax.training import RunDirectory

Config = TypeVar("Config", bound=Options)
STEPS = 4


@contextmanager
def smoke(config: Config, **changes: Any) -> Iterator[Config]:
    """Yields the experiment's options made small, all in a folder of their own; then checks that runs resume exactly.

    Args:
      config: the experiment's options.
      changes: what else has to be smaller.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        # Every letter is a token of the tiny model, and GSM8K's worked solutions are a few hundred letters long.
        model, data = tiny_model(root / "model"), root / "sums.jsonl"
        sums = [(i, j) for i in range(4) for j in range(6)]
        lines = [{"question": f"{i}+{j}?", "choices": [str(i + j), "x"], "answer_index": 0} for i, j in sums]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        common: dict[str, Any] = {"model": str(model), "tasks": (str(data),), "score_on": str(data), "dtype": "float32"}
        common |= {"steps": STEPS, "save_every": STEPS // 2, "batch_size": 4, "smoke": False}
        common |= {"methods": ("stable-lora",), "results": root / "results", "runs": root / "runs"}
        small = replace(config, **common | changes)
        yield small
        check_resume(small)
    print("smoke: all well")


def tiny_model(directory: Path) -> Path:
    """Writes a random decoder of a few thousand parameters, with a tokenizer of single bytes, and returns where."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = DecoderConfig(
        vocab_size=260,
        hidden_size=24,
        intermediate_size=40,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=4,
        rms_norm_eps=1e-5,
        max_positions=512,
    )
    save_huggingface(directory, Decoder(config, rngs=nnx.Rngs(0)))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    return directory


def check_resume(config: Options) -> None:
    """Raises RuntimeError unless a finished run, put back to its step 2, goes on to the same adapter and stops."""
    lines = (line for file in config.results.glob("*.jsonl") for line in read_lines(file.stem, config.results))
    line = next(line for line in lines if "train" in line and "together" not in line)  # those keep no checkpoints
    cell = cell_of(line)
    (whole,) = config.runs.glob(f"*/{cell.key}")
    again = config.runs.with_name("again") / cell.key
    shutil.copytree(whole, again)
    shutil.rmtree(RunDirectory(again).checkpoints / str(STEPS))
    RunDirectory(again).adapter.unlink()
    (outcome,) = train_cells([cell], again.parent)
    equal = RunDirectory(again).adapter.read_bytes() == RunDirectory(whole).adapter.read_bytes()
    if not (equal and outcome["resumed"] and outcome["stable_at"] == line["stable_at"]):
        raise RuntimeError(f"The run {cell.key}, resumed at step 2, did not end as it did uninterrupted: {outcome}.")
