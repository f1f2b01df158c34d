"""The tables of experiments.studies.ablation: variants side by side, and what the stop rule does at each λ."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.running import tables
from experiments.running.cells import Record, read_lines
from experiments.running.markdown import markdown
from stable_lora_jax.training.figures import plot_norms

# What a variant may change.
VARIED = (*tables.OF_METHODS, "weight_decay")
NEVER = ", never stops"
LONGEST = "ablation-longest-run"


def report(results: Path) -> str:
    """Returns the tables, one per task, length and setting, and draws the figure of the longest run."""
    records, text = read_lines("ablation", results), ""
    for each in tables.grouped(records, lambda record: tables.setting(record, *VARIED)).values():
        variants = tables.grouped(each, name_of)
        rows = [[name, *row] for name, row in tables.scored(variants, lambda name: "AdamW").items()]
        train = each[0]["train"]
        text += f"**{tables.task_of(each[0])}**, {each[0]['steps']} steps of {train['batch_size']}, "
        text += f"η = {train['learning_rate']:g}, s = {train['alpha'] / train['rank']:g}\n\n"
        text += f"{markdown(('variant', *tables.SCORES), rows)}\n\n"
        text += _without_the_rule(variants) + tables.made_by(variants)
    if (results / LONGEST).exists():
        plot_norms(results / LONGEST).savefig(results / f"{LONGEST}.png", dpi=110)
        text += f"The norms of every matrix in the longest run of Stable-LoRA:\n\n![norms and gap]({LONGEST}.png)\n\n"
    return text + tables.failures(records) + (tables.LEGEND if text else "")


def name_of(record: Record) -> str:
    """Returns how a table calls a variant."""
    train = record["train"]
    if train.get("decay_only_a"):
        return f"AdamW, weight decay {train['weight_decay']:g} on A"
    if train["method"] == "adamw":
        return "AdamW"
    rest = "" if train["stop_when_stable"] else NEVER
    rest += "" if train["lam_schedule"] == "constant" else f", λ {train['lam_schedule']} to 0"
    return f"λ = {train['lam']:g}{rest}"


def _without_the_rule(variants: Mapping[str, Sequence[Record]]) -> str:
    """Returns sentences that compare the runs that never stop with those that do, at the same λ."""
    text = ""
    for name, each in variants.items():
        plain = name.removesuffix(NEVER)
        if name != plain and (found := tables.compared(each, variants.get(plain, []))):
            text += f"Without the stop rule minus with it, {plain}: {tables.difference(found)}.\n"
    return text and f"{text}\n"
