"""What the committed lines say, in sentences: the verdict of README and documentation, made again by `make results`."""

from pathlib import Path
from typing import Any

from experiments import tables
from experiments.ablation import AblationConfig
from experiments.ablation_tables import NEVER, name_of
from experiments.cells import Record, read_lines

EPOCH = 281  # steps of an epoch of ARC-Easy


def verdict(results: Path) -> str:
    """Returns the verdict in two sentences."""
    own = _difference(_lines(results, "qa", method="stable-lora"), _lines(results, "qa", method="adamw"))
    long, early = _variants(results, 3 * EPOCH), _variants(results, EPOCH)
    saved = _difference(long["λ = 0.001"], long["AdamW"])
    stopped = _difference(long["λ = 0.001"], early["AdamW"])
    return (
        f"On a 135M model, each method at the best rate and scale of its search, Stable-LoRA is "
        f"{tables.percent(own.points)} points of accuracy above AdamW on ARC-Easy (a 95 % interval over seeds): the "
        "paper's gains of 0.5 to 2.1 points are neither confirmed nor refuted. Where training goes on until AdamW "
        f"overfits (three epochs), λ = 0.001 gives the right answers {_likelier(saved)} nats per token more, which is "
        f"no better than AdamW stopped after one epoch ({tables.number(stopped.nats, 3)} nats between them).\n"
    )


def details(results: Path) -> str:
    """Returns the findings one by one, each with its intervals."""
    stable, adamw = (_lines(results, "qa", method=method) for method in ("stable-lora", "adamw"))
    own, same = _difference(stable, adamw), _difference(stable, _lines(results, "qa_controls"))
    short, long = _variants(results, EPOCH), _variants(results, 3 * EPOCH)
    below = [_difference(short["AdamW"], short[f"λ = {lam:g}"]) for lam in AblationConfig.lams]
    points = [100 * each.points.value for each in below]
    saved = _difference(long["λ = 0.001"], long["AdamW"])
    ten = _variants(results, 10 * EPOCH)
    (adamw_ten,), (stable_ten,) = ten["AdamW"], ten["λ = 0.001"]
    large = _variants(results, EPOCH, alpha=16.0)
    stops, never = (_difference(large["AdamW"], large[f"λ = 0.02{rule}"]) for rule in ("", NEVER))
    train = stable[0]["train"]
    chosen = f"η = {train['learning_rate']:g}, s = {train['alpha'] / train['rank']:g} and λ = {train['lam']:g}"
    return "\n".join(
        [
            f"* Accuracy, {stable[0]['steps']} steps on the choices of ARC-Easy: Stable-LoRA minus AdamW is "
            f"{_points(own)} at the best η and s of each one's search, and {_points(same)} at Stable-LoRA's own.",
            f"* Accuracy, an epoch on answers (η = 5e-4, s = 16): λ of {AblationConfig.lams[0]:g} to "
            f"{AblationConfig.lams[-1]:g} come out {min(points):.1f} to {max(points):.1f} points below AdamW.",
            f"* Likelihood of the right answers: with {chosen}, {_signed(same)} nats per token against AdamW after the "
            f"{stable[0]['steps']} steps on choices; with λ = {AblationConfig.lams[-1]:g}, "
            f"{-below[-1].nats.value:+.3f} after the epoch on answers (negative is likelier).",
            f"* Three epochs on answers: λ = 0.001 minus AdamW is {_points(saved)} and {_signed(saved)} nats per token "
            f"({len(long['AdamW'])} seeds).",
            f"* Ten epochs overfit: AdamW {100 * adamw_ten['accuracy_token']:.1f} % and λ = 0.001 "
            f"{100 * stable_ten['accuracy_token']:.1f} %, {adamw_ten['nll_token']:.3f} and "
            f"{stable_ten['nll_token']:.3f} nats per token (one seed).",
            f"* The stop rule makes a large λ safe: at s = 2 and λ = 0.02 an epoch ends {_points(stops)} below AdamW, "
            f"and without the rule {_points(never)}.",
            "",
            "± is half a 95 % interval over the seeds; in brackets, a 95 % interval over questions for the same runs.",
        ]
    )


def _lines(results: Path, name: str, **wanted: Any) -> list[Record]:
    wanted |= {"data": "arc_easy"}
    return [line for line in read_lines(name, results) if line["train"].items() >= wanted.items()]


def _variants(results: Path, steps: int, alpha: float = 128.0) -> dict[str, list[Record]]:
    return tables.grouped(_lines(results, "ablation", steps=steps, alpha=alpha), name_of)


def _difference(records: list[Record], baseline: list[Record]) -> tables.Comparison:
    found = tables.compared(records, baseline)
    if found is None:
        raise ValueError("The lines share no seed, so there is nothing to compare. Run the experiment first.")
    return found


def _points(found: tables.Comparison) -> str:
    low, high = (100 * end for end in found.over_questions[1:])
    return f"{tables.percent(found.points)} points ({low:.1f} to {high:.1f})"


def _signed(found: tables.Comparison) -> str:
    return tables.number(found.nats, 3)


def _likelier(found: tables.Comparison) -> str:
    return tables.number(found.nats, 3).removeprefix("-")
