"""PEFT's public comparison: its protocol on MetaMathQA and GSM8K, with its published number next to ours.

Question:  by the protocol that PEFT compares its methods with, how much of GSM8K do AdamW and Stable-LoRA answer right?
Command:   python -m experiments.studies.peft_comparison --seeds 1      (--train and --test take .jsonl files; --help)
Hardware:  one GPU of 40 GB, and the gated base model. Minutes: not measured; 5000 steps of 4 examples.
Paper:     not in it. PEFT's own: plain LoRA 47.8 %, of one run; another seed changes it by about 1.

Llama-3.2-3B, rank 32 on q and v, η = 1e-4 falling as a cosine, weight decay 0.1, 5000 steps of 4 examples of at most
768 tokens. λ is not searched. Where this description of the protocol is silent: s = 2, the loss is of the solutions
alone, longer examples are left out, and answers have at most 300 tokens.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from experiments.running.cells import run_cells
from experiments.running.smoke import smoke
from experiments.studies import cot

PROMPT = "Question: {} Think step by step.\nAnswer:"
PROTOCOL = {"targets": "qv", "weight_decay": 0.1, "schedule": "cosine", "max_length": 768, "too_long": "skip"}
PUBLISHED = "PEFT's comparison has plain LoRA at 47.8 % after 5000 steps, of one run (another seed: ± 1).\n"


@dataclass(frozen=True, kw_only=True)
class PeftComparisonConfig(cot.CotConfig):
    """Train by the protocol of PEFT's comparison, generate answers, and compare their final numbers."""

    model: str = "meta-llama/Llama-3.2-3B"
    """The base model."""
    lengths: tuple[int, ...] = (5000,)
    """Steps of training."""
    batch_size: int = 4
    """Examples per step."""
    learning_rate: float = 1e-4
    """η."""
    scale: float = 2.0
    """s."""
    max_new_tokens: int = 300
    """Longest answer."""


def report(results: Path) -> str:
    """Returns our table and the published number; nothing where nothing was run."""
    text = cot.report(results, "peft_comparison")
    return text and f"{text}\n{PUBLISHED}"


def main(config: PeftComparisonConfig) -> None:
    if config.smoke:
        tiny = {"train": str(cot.GSM8K), "test": str(cot.GSM8K)}
        with smoke(config, lengths=(4,), seeds=1, max_new_tokens=4, **tiny) as small:
            main(small)
        return
    run_cells(
        "peft_comparison", cot.cells(config, PROMPT, rank=32, **PROTOCOL), config, partial(cot.score, config=config)
    )
    print(report(config.results))


if __name__ == "__main__":
    main(tyro.cli(PeftComparisonConfig))
