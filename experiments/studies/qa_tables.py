"""The tables of `qa`: methods side by side, what needs no training, controls, and what was searched."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.running import tables
from experiments.running.cells import Record, read_lines
from experiments.running.markdown import markdown

# Fields in which the methods of one table differ.
VARIED = (*tables.OF_METHODS, "learning_rate", "alpha")
CHANCE = """\
The intervals ignore the search, which used one seed and 400 questions (a standard error of 2.3 points), so what it
chose is partly chance. * The best η was the smallest or the largest searched: a better one may lie beyond; s and λ were
searched at two values each.
"""


def report(results: Path) -> str:
    """Returns the tables, one per task and setting."""
    records = read_lines("qa", results)
    searches = tables.grouped(read_lines("qa_search", results), _searched)
    controls, text = read_lines("qa_controls", results), ""
    for of_task in tables.grouped(records, lambda record: tables.setting(record, *VARIED)).values():
        methods = tables.grouped(of_task, lambda record: record["train"]["method"])
        scores, rows = tables.scored(methods, lambda method: "adamw"), []
        search = searches.get(_searched(of_task[0]), [])
        for method, each in methods.items():
            train = each[0]["train"]
            rates = {line["train"]["learning_rate"] for line in search if line["train"]["method"] == method}
            edge = "*" if len(rates) > 1 and train["learning_rate"] in (min(rates), max(rates)) else ""
            numbers = f"{train['learning_rate']:g}{edge}, {train['alpha'] / train['rank']:g}, {train.get('lam', '-')}"
            rows.append([method, numbers, *scores[method]])
        one = of_task[0]
        text += f"**{tables.task_of(one)}**, {one['questions']} questions ({Path(one['score_on']).name}), "
        text += f"{one['steps']} steps of {one['train']['batch_size']}, {Path(one['train']['model']).name}\n\n"
        text += f"{markdown(('method', 'η, s, λ', *tables.SCORES), rows)}\n\n"
        control = [record for record in controls if tables.setting(record, *VARIED) == tables.setting(one, *VARIED)]
        control = control or _of_the_same_numbers(methods)
        text += _without_training(one, results) + _at_its_numbers(methods.get("stable-lora", []), control)
        text += _grid(search)
        text += tables.made_by({**methods, "AdamW at Stable-LoRA's η and s": control, "the search": search})
    return text + tables.failures(records) + (f"{tables.LEGEND}{CHANCE}" if text else "")


def short(results: Path) -> str:
    """Returns the README's table: the tasks side by side, accuracy and likelihood, and their differences from AdamW."""
    header, rows = ["method"], {}
    wanted = [tables.SCORES.index(name) for name in ("accuracy, %", "minus AdamW", "nats per token")]
    wanted.append(wanted[-1] + 1)  # "minus AdamW" stands there twice
    for of_task in tables.grouped(read_lines("qa", results), lambda r: tables.setting(r, *VARIED)).values():
        header += [f"{tables.task_of(of_task[0])}: accuracy, %", "minus AdamW", "nats per token", "minus AdamW"]
        if line := _reference(of_task[0], results):
            base = [f"{100 * line['base']['accuracy_token']:.1f}", "-", f"{line['base']['nll_token']:.3f}", "-"]
            rows.setdefault("before training", []).extend(base)
            rows.setdefault("longest answer", []).extend([f"{100 * line['longest_answer']:.1f}", "-", "-", "-"])
        methods = tables.grouped(of_task, lambda record: record["train"]["method"])
        for method, row in tables.scored(methods, lambda method: "adamw").items():
            rows.setdefault(method, []).extend(row[column] for column in wanted)
    return markdown(header, [[name, *cells] for name, cells in rows.items()])


def _without_training(one: Record, results: Path) -> str:
    """Returns a sentence about the base model and the longest answer, on the questions of a line."""
    if not (line := _reference(one, results)):
        return ""
    base = line["base"]
    return (
        f"Before training: {100 * base['accuracy_token']:.1f} %, summed {100 * base['accuracy_sum']:.1f} %, "
        f"{base['nll_token']:.3f} nats per token. Always choosing the answer with the most characters: "
        f"{100 * line['longest_answer']:.1f} %.\n\n"
    )


def _reference(one: Record, results: Path) -> Record | None:
    known = {"score_on": one["score_on"]} | {name: one["train"][name] for name in ("data", "model", "dtype")}
    return next((line for line in read_lines("qa_references", results) if line.items() >= known.items()), None)


def _at_its_numbers(stable: Sequence[Record], control: Sequence[Record]) -> str:
    """Returns a sentence that compares Stable-LoRA with AdamW at Stable-LoRA's η and s."""
    if not control or not (found := tables.compared(stable, control)):
        return ""
    train = stable[0]["train"]
    return (
        f"AdamW at Stable-LoRA's η = {train['learning_rate']:g} and s = {train['alpha'] / train['rank']:g}: "
        f"{tables.percent(tables.of_seeds(control, 'accuracy_token'))} %, "
        f"{tables.number(tables.of_seeds(control, 'nll_token'), 3)} nats per token. Stable-LoRA minus that: "
        f"{tables.difference(found)}.\n\n"
    )


def _of_the_same_numbers(methods: Mapping[str, Sequence[Record]]) -> Sequence[Record]:
    """Returns AdamW's lines if its η and s are Stable-LoRA's, else nothing."""
    sides = [methods.get(method, []) for method in ("adamw", "stable-lora")]
    numbers = [{(line["train"]["learning_rate"], line["train"]["alpha"]) for line in side} for side in sides]
    return sides[0] if numbers[0] == numbers[1] else []


def _grid(search: Sequence[Record]) -> str:
    """Returns the table of a search: a row for every method and λ, a column for every s and η."""
    if not search:
        return ""
    found: dict[str, dict[tuple[float, float], str]] = {}
    for line in search:
        train = line["train"]
        row = found.setdefault(train["method"] + (f", λ = {train['lam']:g}" if "lam" in train else ""), {})
        told = f"{100 * line['accuracy_token']:.1f}, {line['nll_token']:.2f}"
        row[train["alpha"] / train["rank"], train["learning_rate"]] = told
    columns = sorted({column for row in found.values() for column in row})
    header = ["searched", *(f"s = {scale:g}, η = {rate:g}" for scale, rate in columns)]
    rows = [[name, *(row.get(column, "-") for column in columns)] for name, row in found.items()]
    told = f"The search: accuracy in % and nats per token on {search[0]['questions']} held-out questions, seed "
    told += ", ".join(sorted({str(line["train"]["seed"]) for line in search}))
    return f"{told}.\n\n{markdown(header, rows)}\n\n"


def _searched(record: Record) -> str:
    """Returns what a search has in common with what it is made for: all but the questions left out and scored."""
    return tables.setting(record, *VARIED, "holdout", "score_on")
