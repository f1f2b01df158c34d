"""Pilot: twelve ways to train at five learning rates, three settings, 420 runs of the 135M model on one H100.

Question:  at each method's best learning rate, what does the shrink buy against AdamW, a smaller start, decay and
           stopping early; and over how wide a range of rates does it help?
Command:   python -m experiments.studies.pilot    (reads results/pilot/*.npz, measured on 2026-11-26)
Hardware:  one H100 for the runs, about a minute per 60 of them; any for the tables. Minutes: 0.1.
Expected:  (2026-11-26) a rule without λ that had been best in a first study on small problems (horizon: close the gap
           evenly until the last step) is best here too.
Observed:  it is the worst: refuted.

LoRA r = 8 on q and v, s = 16, bfloat16 base, 8 questions per step in packed rows, cosine after 3 % warm-up, clip 1,
loss on the right answer. Settings: few (500 questions of ARC-Easy, 8 passes; 3 seeds), arc3 (1930 questions, 3 passes;
2 seeds), fresh (4000 questions of Social IQA, once; 2 seeds). Scored on ARC-Easy's test split (2376 questions) and
Social IQA's validation split (1954), per question. Limits: one model, one s, few seeds; rates are chosen on one half of
the questions and reported on the other; the best rates of fresh lie at the grid's upper end, those of few at its lower.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from experiments.running.markdown import markdown
from experiments.studies.valley import GOOD_RATES, VALLEYS, valley
from stable_lora_jax.evaluation import Estimate, holm, seeds_and_questions

# As the runs are ordered; rates innermost.
METHODS = {
    "AdamW": "C7",
    "λ = 0.0005": "C0",
    "λ = 0.002": "C1",
    "λ = 0.005": "C2",
    "horizon": "C3",
    "λ = 0.002, never stops": "C4",
    "A₀ × 1/4": "C5",
    "A₀ × 1/16": "C6",
    "decay on A, 0.002 per step": "C8",
    "decay on A and B, 0.001 per step": "C9",
    "rate of B × 4": "0.3",
    "rate of B × 1/4": "deeppink",
}
EARLY = "AdamW, stopped early"
RATES = (6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3)
SETTINGS = {"few": 3, "arc3": 2, "fresh": 2}  # and their seeds
LENGTHS = (20, 40, 60, 80, 100)  # % of the run after which AdamW was scored
SHOWN = ("AdamW", "λ = 0.0005", "λ = 0.002", "λ = 0.005", "A₀ × 1/4", "decay on A, 0.002 per step")
Summed = np.ndarray  # (seeds, questions): summed log p of the right answers


@dataclass(frozen=True)
class Setting:
    """One setting's runs.

    Attributes:
      log_p: method -> (rates, seeds, questions), summed log p of the right answer.
      tokens: of each right answer.
      correct: method -> (rates, seeds, questions), whether the right answer is chosen, per token.
    """

    log_p: dict[str, np.ndarray]
    tokens: np.ndarray
    correct: dict[str, np.ndarray]

    def nats(self, method: str) -> np.ndarray:
        """Returns nats per token, (rates, seeds)."""
        return -self.log_p[method].sum(-1) / self.tokens.sum()


def load(results: Path, name: str) -> Setting:
    """Returns the runs of a setting; AdamW stopped early has 25 "rates": the five at each of `LENGTHS`."""
    files = [np.load(results / "pilot" / f"{name}{seed}.npz") for seed in range(SETTINGS[name])]
    tokens = files[0]["count"].astype(float)

    def bits(field: str, lead: tuple[int, ...]) -> np.ndarray:
        flat = np.stack([np.unpackbits(file[field], axis=-1)[..., : len(tokens)] for file in files], axis=-2)
        return flat.reshape(*lead, len(files), len(tokens))

    lead = (len(METHODS), len(RATES))
    log_p = np.stack([file["nats"].astype(float) for file in files], axis=-2).reshape(*lead, len(files), -1)
    correct = bits("ok", lead)
    early = np.stack([file["early"].astype(float) for file in files], axis=-2)
    of = dict(zip(METHODS, log_p, strict=True))
    right = dict(zip(METHODS, correct, strict=True))
    of[EARLY] = np.concatenate([early.reshape(-1, len(files), len(tokens)), of["AdamW"]])
    right[EARLY] = np.concatenate([bits("early_ok", (4 * len(RATES),)), right["AdamW"]])
    return Setting(of, tokens, right)


def at_best_rate(setting: Setting, method: str) -> Summed:
    """Returns log p at the rate that is best on one half of the questions, of the other half; both ways."""
    order = np.random.default_rng(5).permutation(len(setting.tokens))
    halves = np.array_split(order, 2)
    log_p, chosen = setting.log_p[method], np.empty(setting.log_p[method].shape[1:])
    for ours, theirs in (halves, halves[::-1]):
        best = log_p[:, :, theirs].sum((1, 2)).argmax()
        chosen[:, ours] = log_p[best][:, ours]
    return chosen


def at_rate(index: int) -> Callable[[Setting, str], Summed]:
    """Returns what gives log p at one of the rates."""
    return lambda setting, method: setting.log_p[method][index]


def over_rates(setting: Setting, method: str) -> Summed:
    """Returns log p meaned over the five rates."""
    return setting.log_p[method].mean(0)


def compared(setting: Setting, of: Callable[[Setting, str], Summed], method: str) -> tuple[Estimate, float]:
    """Returns nats per token minus AdamW's, with a 95 % interval over seeds and questions, and its p value."""
    return seeds_and_questions(of(setting, "AdamW") - of(setting, method), setting.tokens)


def report(results: Path) -> str:
    """Returns the tables, one per setting, and draws the figure."""
    text = ""
    for name in SETTINGS:
        setting, rows = load(results, name), []
        others = [method for method in (*METHODS, EARLY) if method != "AdamW"]
        best = {method: compared(setting, at_best_rate, method) for method in others}
        mean = {method: compared(setting, over_rates, method) for method in others}
        adjusted = {
            id(found): dict(zip(others, holm([found[method][1] for method in others]), strict=True))
            for found in (best, mean)
        }
        for method in (*METHODS, EARLY):
            nats, right = setting.nats(method).mean(1), setting.correct[method].mean((1, 2))
            curve = [f"{value:.3f}" for value in nats] if method != EARLY else ["-"] * len(RATES)
            shown = ["-"] * 4
            if method != "AdamW":
                shown = [told(best[method][0]), p_text(adjusted[id(best)][method])]
                shown += ["-"] * 2 if method == EARLY else [told(mean[method][0]), p_text(adjusted[id(mean)][method])]
            wide = "-" if method == EARLY else valley(setting.log_p[method], setting.tokens, RATES)
            rows.append([method, *curve, *shown, wide, f"{100 * right[nats.argmin()]:.1f}"])
        header = ("nats per token", *(f"η = {rate:g}" for rate in RATES), "at the best rate, minus AdamW", "p")
        header += ("mean of the rates, minus AdamW", "p", GOOD_RATES, "accuracy, %")
        text += f"**{name}**, {len(setting.tokens)} questions, {SETTINGS[name]} seeds\n\n{markdown(header, rows)}\n\n"
    draw(results)
    return f"{text}{LEGEND}{VALLEYS}\n![nats per token over the learning rate, and over AdamW's steps](pilot.png)\n"


LEGEND = """\
± is half a 95 % interval over seeds and questions together (normal; two or three seeds say little about seeds). The p
values of a column are corrected (Holm) for its comparisons. *Accuracy*: per token, at the rate of least nats.
"""


def draw(results: Path) -> None:
    """Writes the figure: a column per setting; above, nats per token over η, below, AdamW's while it trains."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    above, below = figure.subplots(2, len(SETTINGS))
    for ax, under, name in zip(above, below, SETTINGS, strict=True):
        setting = load(results, name)
        for method in SHOWN:
            nats = setting.nats(method)
            ax.plot(RATES, nats.mean(1), color=METHODS[method], marker="o", markersize=3.5, label=method)
        ax.set(xscale="log", xlabel="peak learning rate η", title=name)
        shown = np.stack([setting.nats(method).mean(1) for method in SHOWN])
        ax.set_ylim(shown.min() - 0.02, min(shown.max() + 0.02, shown.min() + 1))
        over_steps = setting.nats(EARLY).mean(1).reshape(len(LENGTHS), len(RATES))
        for number, rate in enumerate(RATES):
            under.plot(LENGTHS, over_steps[:, number], marker="o", markersize=3.5, label=f"η = {rate:g}")
        under.set(xlabel="share of the run, %", title="AdamW while it trains")
    for axes in (above, below):
        axes[0].set_ylabel("nats per token of the right answers")
        axes[0].legend(fontsize=8)
    figure.savefig(results / "pilot.png", dpi=110)


def told(found: Estimate) -> str:
    """Returns a difference as -0.013 ± 0.003."""
    return f"{found.value:+.3f} ± {(found.high - found.low) / 2:.3f}"


def p_text(value: float) -> str:
    """Returns a p value; a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:.3f}" if value >= 0.0005 else "<0.001"


def main(results: Path = Path("experiments/results")) -> None:
    """Make the tables and the figure of the pilot's runs.

    Args:
      results: folder of the runs, in pilot/, and of the figure.
    """
    print(report(results))


if __name__ == "__main__":
    tyro.cli(main)
