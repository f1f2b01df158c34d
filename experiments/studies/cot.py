"""Chain of thought: MetaMathQA to GSM8K, exact match of numbers (the paper's table of mathematical reasoning).

Question:  after 1000, 2000 and 5000 steps on worked solutions, how much of GSM8K do AdamW and Stable-LoRA answer right?
Command:   python -m experiments.studies.cot --model Qwen/Qwen2-0.5B     (--train and --test take .jsonl files; --help)
Hardware:  an accelerator of 16 GB or more. Minutes: not measured. On two cores 100 steps of the 135M model take 8,
           and the answers to 200 problems 5: `--train` GSM8K's own file, `--test` the first 200 lines of its test file,
           `--lengths 100 --scale 16 --learning-rate 5e-4 --lam 0.002 --seeds 1 --max-new-tokens 200 --methods adamw
           stable-lora`.
Expected:  (2026-11-30) in LOG.md.
Observed:  that small form: λ = 0.002 minus AdamW is +0.005 ± 0.001 nats per token of the test solutions (one
           seed, over 200 problems), AdamW answers 3.0 % and Stable-LoRA 3.5 % right.
Paper:     3B at 5000 steps: 59.44 with Stable-LoRA, 58.83 with AdamW.

η, s and λ are not searched here; the paper searches them for each method. Lines of a training file have "query" and
"response" (MetaMathQA) or "question" and "answer" (GSM8K); those of more than 512 tokens, 5 of GSM8K's 7473, are left
out. Where a model is too small to solve problems, the nats per token of the test set's own solutions still tell methods
apart.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.running import tables
from experiments.running.cells import Cell, Options, Record, bits, read_lines, run_cells, training
from experiments.running.markdown import markdown
from experiments.running.shared import right_answers, scored, trained_model
from experiments.running.smoke import smoke
from experiments.studies import pilot
from stable_lora_jax.data import Completion, encode_all, load_jsonl, load_tokenizer
from stable_lora_jax.evaluation import exact_match, seeds_and_questions
from stable_lora_jax.models import generate

AT_ONCE = 64  # problems answered at once
PROMPT = "Question: {}\nAnswer:"
GSM8K = Path(__file__).parent / "gsm8k" / "problems.jsonl"  # ten problems, for the smoke test


OVER_PROBLEMS = ("nats minus AdamW, over problems too", "p")
LEGEND = """\
*Over problems too*: ± is half a 95 % interval over seeds and problems together, of one seed over the problems alone;
p is not corrected.
"""


@dataclass(frozen=True, kw_only=True)
class CotConfig(Options):
    """Train on worked solutions, generate answers, and compare their final numbers."""

    train: str = "meta-math/MetaMathQA"
    """A data set of the hub, or a .jsonl file."""
    test: str = "openai/gsm8k"
    """The same, with GSM8K's fields."""
    lengths: tuple[int, ...] = (1000, 2000, 5000)
    """Steps of training."""
    learning_rate: float = 2e-4
    """η; the paper searches 5e-5 to 8e-4."""
    scale: float = 4.0
    """s; the paper searches 2 to 64."""
    lam: float = 0.001
    """λ of Stable-LoRA."""
    seeds: int = 3
    """Seeds 0, 1, ..."""
    max_new_tokens: int = 400
    """Longest answer."""


def as_file(source: str, split: str, folder: Path, prompt: str = PROMPT) -> str:
    """Returns a .jsonl file of prompts and completions, named by its content, made from a file or the hub."""
    import datasets

    if source.endswith((".jsonl", ".jsonl.gz")):
        records: Any = datasets.load_dataset("json", data_files=source, split="train")
    else:
        records = datasets.load_dataset(source, *(["main"] if source.endswith("gsm8k") else []), split=split)
    pairs = [(r["query"], r["response"]) if "query" in r else (r["question"], r["answer"]) for r in records]
    lines = [{"prompt": prompt.format(question), "completion": f" {answer}"} for question, answer in pairs]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file = folder / f"{Path(source).name.split('.')[0]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return str(file)


def cells(config: CotConfig, prompt: str = PROMPT, rank: int = 8, **others: Any) -> list[Cell]:
    """Returns the runs of all lengths, methods and seeds; others are further options of every run."""
    folder = config.runs.parent / "data"
    train, test = (
        as_file(source, split, folder, prompt) for source, split in ((config.train, "train"), (config.test, "test"))
    )
    numbers = {"learning_rate": config.learning_rate, "lam": config.lam, "loss": "answer", "too_long": "skip"}
    numbers |= {"rank": rank, "alpha": rank * config.scale} | others
    scored = {"score_on": test, "scoring": f"max_new_tokens={config.max_new_tokens}"}
    return [
        Cell(train=training(config, train, method=method, seed=seed, **numbers | {"steps": steps}), **scored)
        for steps in config.lengths
        for method in config.methods
        for seed in range(config.seeds)
    ]


def score(cell: Cell, directory: Path, config: CotConfig) -> Record:
    """Returns the share of problems whose generated answer ends in the right number, which ones, and the nats.

    Of every problem also the log p and the tokens of its own solution.
    """
    model, tokenizer = trained_model(cell.train.model, directory), load_tokenizer(cell.train.model.name)
    problems = [item for item in load_jsonl(cell.score_on) if isinstance(item, Completion)]
    found = scored(model, encode_all(tokenizer, problems))
    log_p, tokens = right_answers(found)
    prompts = tokenizer([p.prompt for p in problems], add_special_tokens=True, verbose=False)["input_ids"]
    answers: list[list[int]] = []
    options: Any = {"max_new_tokens": config.max_new_tokens, "eos_id": tokenizer.eos_token_id}
    for start in range(0, len(prompts), AT_ONCE):
        answers += generate(model, prompts[start : start + AT_ONCE], **options)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    right = [exact_match(text, problem.completion) for text, problem in zip(texts, problems, strict=True)]
    scores = {"accuracy_token": sum(right) / len(right), "questions": len(right), "correct_token": bits(right)}
    nats = {"nll_token": round(found.nll_token, 6), "log_p": np.round(log_p, 3).tolist(), "tokens": tokens.tolist()}
    return scores | nats


def report(results: Path, name: str = "cot") -> str:
    """Returns the tables of an experiment's lines, one per setting."""
    records, text = read_lines(name, results), ""
    for each in tables.grouped(records, lambda record: tables.setting(record, *tables.OF_METHODS, "steps")).values():
        groups = tables.grouped(each, lambda record: (record["steps"], record["train"]["method"]))
        scores = tables.scored(groups, lambda key: (key[0], "adamw")).items()
        rows = [[*key, *row, *_over_problems(groups[key], groups.get((key[0], "adamw"), []))] for key, row in scores]
        text += f"**{each[0]['train']['model']}**, exact match\n\n"
        text += f"{markdown(('steps', 'method', *tables.SCORES, *OVER_PROBLEMS), rows)}\n\n{tables.made_by(groups)}"
    return text + tables.failures(records) + (f"{tables.LEGEND}\n{LEGEND}" if text else "")


def _over_problems(records: Sequence[Record], baseline: Sequence[Record]) -> tuple[str, str]:
    """Returns the nats per token minus those of the baseline's runs of the same seeds, and the p value."""
    of_seed = {record["train"]["seed"]: record for record in baseline}
    pairs = [(record, of_seed[record["train"]["seed"]]) for record in records if record["train"]["seed"] in of_seed]
    if not pairs or all(record is other for record, other in pairs):
        return "-", "-"
    differences = np.array([np.subtract(other["log_p"], record["log_p"]) for record, other in pairs])
    found, p = seeds_and_questions(differences, records[0]["tokens"])
    return pilot.told(found), pilot.p_text(p)


def main(config: CotConfig) -> None:
    if config.smoke:
        problems = {"train": str(GSM8K), "test": str(GSM8K), "max_new_tokens": 4}
        with smoke(config, lengths=(4,), seeds=1, methods=("stable-lora", "adamw"), **problems) as small:
            main(small)
        return
    run_cells("cot", cells(config), config, lambda cell, directory: score(cell, directory, config))
    print(report(config.results))


if __name__ == "__main__":
    main(tyro.cli(CotConfig))
