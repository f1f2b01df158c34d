"""The tables of experiments.qa: methods side by side, what needs no training, and AdamW at Stable-LoRA's η and s."""

from collections.abc import Sequence
from pathlib import Path

from experiments import tables
from experiments.cells import Record, read_lines

# Fields in which the methods of one table differ.
VARIED = ("method", "learning_rate", "alpha", "lam")
CHANCE = """\
The intervals ignore the search, which used one seed and 400 questions (a standard error of 2.3 points), so what it
chose is partly chance. * The best η was the smallest or the largest searched: a better one may lie beyond.
"""


def report(results: Path) -> str:
    """Returns the tables, one a task and setting."""
    records = read_lines("qa", results)
    # A search differs from what it is made for in the questions that it leaves out and is scored on.
    searches = tables.grouped(read_lines("qa_search", results), lambda r: (_searched(r), r["train"]["method"]))
    controls, text = read_lines("qa_controls", results), ""
    for of_task in tables.grouped(records, lambda record: tables.setting(record, *VARIED)).values():
        methods = tables.grouped(of_task, lambda record: record["train"]["method"])
        scores, rows = tables.scored(methods, lambda method: "adamw"), []
        for method, each in methods.items():
            train, search = each[0]["train"], searches.get((_searched(each[0]), method), [])
            found = sorted((100 * record["accuracy_token"] for record in search), reverse=True)
            rates = {record["train"]["learning_rate"] for record in search}
            edge = "*" if len(rates) > 1 and train["learning_rate"] in (min(rates), max(rates)) else ""
            numbers = f"{train['learning_rate']:g}{edge}, {train['alpha'] / train['rank']:g}, {train['lam'] or '-'}"
            told = f"{found[0]:.1f}, {found[1]:.1f} … {found[-1]:.1f} of {len(found)}" if len(found) > 1 else "-"
            rows.append([method, numbers, told, *scores[method]])
        one = of_task[0]
        text += f"**{tables.task_of(one)}**, {one['questions']} questions ({Path(one['score_on']).name}), "
        text += f"{one['steps']} steps of {one['train']['batch_size']}, {Path(one['train']['model']).name}\n\n"
        text += f"{tables.markdown(('method', 'η, s, λ', 'in the search, %', *tables.SCORES), rows)}\n\n"
        control = [record for record in controls if tables.setting(record, *VARIED) == tables.setting(one, *VARIED)]
        text += _without_training(one, results) + _at_its_numbers(methods.get("stable-lora", []), control)
        text += tables.commits([*of_task, *control])
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
    return tables.markdown(header, [[name, *cells] for name, cells in rows.items()])


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
        f"{tables.percent(found.points)} points, {tables.number(found.nats, 3)} nats (p {found.p_points:.3f} and "
        f"{found.p_nats:.3f}, uncorrected).\n\n"
    )


def _searched(record: Record) -> str:
    return tables.setting(record, *VARIED, "holdout", "score_on")
