"""What the committed lines say, one finding after the other, made again by `make results`."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.running import tables
from experiments.running.cells import Record, correctness, read_lines
from experiments.studies import pilot, small_decoder_tables, targets
from experiments.studies.ablation import AblationConfig
from experiments.studies.ablation_tables import NEVER, name_of
from experiments.studies.rates_tables import Grid, Group, Repeated, by_setting, grid_of, of_pilot, repeated
from experiments.verdict import DATA, STOPPED, TOLD, at_half_the_rate, stopping
from stable_lora_jax.evaluation import Estimate, holm, seeds_and_questions
from stable_lora_jax.training import read_metrics

_LAMS = ("λ = 0.0005", "λ = 0.002", "λ = 0.005")
_DECAY = "decay on A, 0.002 per step"
EPOCH = 281  # steps of an epoch of ARC-Easy


def details(results: Path) -> str:
    """Returns the findings one by one, each with its intervals."""
    stable, adamw = (_lines(results, "qa", method=method) for method in ("stable-lora", "adamw"))
    own, same = _difference(stable, adamw), _difference(stable, _lines(results, "qa_controls"))
    short, long = _variants(results, EPOCH), _variants(results, 3 * EPOCH)
    below = [_difference(short["AdamW"], short[f"λ = {lam:g}"]) for lam in AblationConfig.lams]
    points = [100 * each.points.value for each in below]
    saved, stopped = (_difference(long["λ = 0.001"], each["AdamW"]) for each in (long, short))
    ten = _variants(results, 10 * EPOCH)
    (adamw_ten,), (stable_ten,) = ten["AdamW"], ten["λ = 0.001"]
    large = _variants(results, EPOCH, alpha=16.0)
    stops, never = (_difference(large["AdamW"], large[f"λ = 0.02{rule}"]) for rule in ("", NEVER))
    made = [(each["λ = 0.001"], each["AdamW"]) for each in (long, ten)]  # that of three epochs first
    made += [(stable, adamw), (stable, _lines(results, "qa_controls")), (large["λ = 0.02"], large["AdamW"])]
    made += [(short[f"λ = {lam:g}"], short["AdamW"]) for lam in AblationConfig.lams]
    p_values = [_p_value(*pair) for pair in made]
    p, corrected = p_values[0], holm(p_values)[0]
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
            f"({len(long['AdamW'])} seeds); minus AdamW stopped after one epoch, {_signed(stopped)} nats. The points "
            f"have p = {p:.3f} over seeds and questions, and {corrected:.2f} corrected for the {len(made)} comparisons "
            "of Stable-LoRA with AdamW that this page makes in accuracy.",
            f"* Ten epochs overfit: AdamW {100 * adamw_ten['accuracy_token']:.1f} % and λ = 0.001 "
            f"{100 * stable_ten['accuracy_token']:.1f} %, {adamw_ten['nll_token']:.3f} and "
            f"{stable_ten['nll_token']:.3f} nats per token (one seed).",
            f"* The stop rule makes a large λ safe: at s = 2 and λ = 0.02 an epoch ends {_points(stops)} below AdamW, "
            f"and without the rule {_points(never)}.",
            _modules(results),
            *_pilot(results),
            *_repeats(results),
            *_at_best_rates(results),
            *_scales(results),
            _stops(results),
            _moved(results),
            *_small_decoder(results),
            "",
            "± is half a 95 % interval over the seeds, and of the pilot and of rates over seeds and questions together;"
            " in brackets, a 95 % interval over questions for the same runs.",
        ]
    )


def _modules(results: Path) -> str:
    """Returns what the number of adapted modules changes, and what is left at half of AdamW's rate."""
    groups = targets.by_modules(_lines(results, "targets"), results)

    def told(modules: str, method: str) -> str:
        found = _difference(groups[modules, "stable-lora"], groups[modules, method])
        return f"{_points(found)} and {_signed(found)} nats"

    names = {"qv": "q and v", "qkvo": "all of attention", "qkvogud": "all modules"}
    searched = "; ".join(f"with {name} {told(modules, 'adamw')}" for modules, name in names.items())
    seeds = tables.seeds_text(*(len(each) for each in groups.values()))
    return (
        f"* Target modules ({seeds}, each at the η, s and λ that was searched with q and v): Stable-LoRA minus AdamW "
        f"is {searched}. With all modules, minus AdamW at half its rate, {told('qkvogud', targets.HALVED)}."
    )


def _pilot(results: Path) -> list[str]:
    """Returns what the pilot's runs say beyond the verdict."""
    settings = {name: pilot.load(results, name) for name in pilot.SETTINGS}
    few, fresh = settings["few"], settings["fresh"]

    def told(setting: pilot.Setting, of: Callable[[pilot.Setting, str], np.ndarray], *methods: str) -> str:
        return ", ".join(f"{method} {pilot.told(pilot.compared(setting, of, method)[0])}" for method in methods)

    def against_adamw(rates: dict[str, int]) -> str:
        at = [(settings[name], pilot.at_rate(index)) for name, index in rates.items()]
        found = {lam: [pilot.compared(setting, of, lam)[0].value for setting, of in at] for lam in _LAMS}
        return ", ".join(f"{lam} {min(each):+.3f} to {max(each):+.3f}" for lam, each in found.items())

    best = {name: int(setting.nats("AdamW").mean(1).argmin()) for name, setting in settings.items()}
    means = ("λ = 0.002", "A₀ × 1/4", "rate of B × 1/4")
    return [
        "* Which λ (the pilot's three settings, nats per token against AdamW at the same rate): at AdamW's best of the "
        f"five, {against_adamw(best)}; at the highest, {pilot.RATES[-1]:g}, "
        f"{against_adamw(dict.fromkeys(settings, -1))}.",
        "* With fresh data, each at its best rate of the pilot's, in nats per token against AdamW: "
        f"{told(fresh, pilot.at_best_rate, *_LAMS, 'A₀ × 1/4', _DECAY)}.",
        f"* As the mean of the pilot's rates, against AdamW: {told(few, pilot.over_rates, *means)} with "
        f"{DATA['few']}; {told(fresh, pilot.over_rates, *means)} with {DATA['fresh']}.",
    ]


def _repeats(results: Path) -> list[str]:
    """Returns what cells of the pilot gave that were measured again, one sentence per setting."""
    sentences = []
    for group, found in _repeated(results).items():
        told = []
        for each in found:
            if each.method == "AdamW":
                there, here = each.nats
                told.append(f"at η = {each.rate:g} AdamW has {here:.3f} nats per token (pilot: {there:.3f})")
            else:
                there, here = (pilot.told(minus) for minus in each.minus_adamw)
                told.append(f"{each.method} {here} against it (pilot: {there})")
        seeds = tables.seeds_text(*(each.seeds for each in found))
        where = f"{group.name}, s = {group.scale:g}, {group.dtype}, {seeds}, ± over questions"
        sentences.append(f"* Cells of the pilot, measured again here ({where}): {'; '.join(told)}.")
    return sentences


def _at_best_rates(results: Path) -> list[str]:
    """Returns what methods are worth at their best rates of the grids that were measured here, a sentence each."""
    sentences = []
    for group, by_cell in by_setting(results).items():
        if (grid := grid_of(by_cell)) is None:
            continue

        def chosen(method: str, grid: Grid = grid) -> str:
            own = "" if grid.has_adamws_rates(method) else f" of {len(grid.rates[method])} of its own"
            return f"{method} (η = {grid.of_best(method):g}{own}{', an edge' if grid.is_edge(method) else ''})"

        told = [f"{chosen(name)} {_at_best(grid, name)}" for name in grid.best if name != "AdamW"]
        where = f"{group.name}, s = {group.scale:g}, {group.dtype}"
        rates = grid.rates["AdamW"]
        least = min(len(grid.seeds_at_best(name)) for name in grid.best)
        alone = " Of one seed, ± is over questions alone." if least == 1 else ""
        sentences.append(
            f"* Each at the best of {len(rates)} rates from {rates[0]:g} to {rates[-1]:g} ({where}): "
            f"against {chosen('AdamW')}, in nats per token, {'; '.join(told)}.{alone}"
        )
    return sentences


def _scales(results: Path) -> list[str]:
    """Returns how curves at s = 2 differ from those at s = 16 and a quarter of the rate, a sentence each setting."""
    found, sentences = by_setting(results), []
    for small, large in itertools.product(found, found):
        if (small.scale, large.scale) != (2, 16) or (small.data, small.steps) != (large.data, large.steps):
            continue
        differences: dict[str, list[float]] = {}
        for (method, rate, seed), line in found[small].items():
            if other := found[large].get((method, rate / 4, seed)):
                differences.setdefault(method, []).append(line["nll_token"] - other["nll_token"])
        told = "; ".join(f"{name} {min(each):+.3f} to {max(each):+.3f}" for name, each in differences.items())
        if told:
            sentences.append(
                f"* {small.name}, s = 2 ({small.dtype}), minus s = 16 ({large.dtype}) at a quarter of the rate, in "
                f"nats per token: {told}."
            )
    return sentences


def _stops(results: Path) -> str:
    """Returns how many matrices became stable with each λ, by rate, in each setting that was measured here."""
    told = []
    for group, by_cell in by_setting(results).items():
        for lam in (*_LAMS, STOPPED):
            runs = sorted(
                (rate, line["stable_at"]) for (name, rate, seed), line in by_cell.items() if (name, seed) == (lam, 0)
            )
            shares = [(rate, [bool(step) for pair in steps.values() for step in pair]) for rate, steps in runs]
            alike = itertools.groupby(shares, lambda share: (sum(share[1]), len(share[1])))
            counts = ((count, total, [rate for rate, _ in each]) for (count, total), each in alike)
            found = [f"{count} of {total} at η = {_span(rates)}" for count, total, rates in counts]
            told += [f"{lam} ({group.name}, s = {group.scale:g}, {group.dtype}) {', '.join(found)}"] if found else []
    at_best = stopping(results)
    return (
        f"* How many matrices became stable within a run, so that the shrink stopped: "
        f"{f'{at_best} Of seed 0, by rate: ' if at_best else 'of seed 0, '}{'; '.join(told)}."
    )


def _span(rates: list[float]) -> str:
    return f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"


def _moved(results: Path) -> str:
    """Returns how λ's curve over the rates differs from AdamW's, moved by an octave and as it is, in each setting."""
    told = [
        f"{min(moved):+.3f} to {max(moved):+.3f} with {data} (at the same rate {min(same):+.3f} to {max(same):+.3f})"
        for data, (moved, same) in at_half_the_rate(results).items()
    ]
    return f"* {TOLD} at a rate, minus AdamW at half that rate, in nats per token: {'; '.join(told)}."


def _at_best(grid: Grid, method: str) -> str:
    """Returns a method's nats per token minus AdamW's, each at its best rate, and of how many seeds that is."""
    return f"{pilot.told(grid.gain(method)[0])} ({tables.seeds_text(len(grid.seeds_at_best(method)))})"


def _small_decoder(results: Path) -> list[str]:
    """Returns what the ways of the small decoder are worth at their best rates, and which the seeds can tell apart."""
    settings = small_decoder_tables.by_setting(read_metrics(results / "small_decoder.jsonl"))
    if not settings:
        return []
    found = [(each, small_decoder_tables.minus(each.at_best, "AdamW")) for each in settings]

    def span(*ways: str) -> str:
        values = [of_setting[way][0].value for _, of_setting in found for way in ways if way in of_setting]
        return f"{min(values):+.3f} to {max(values):+.3f}"

    compared: dict[tuple[str, Estimate], tuple[str, float]] = {}
    for each, of_setting in found:
        for way, (estimate, p) in of_setting.items():
            if not np.isnan(p):  # ways that came out the same are one comparison, under the first's name
                compared.setdefault((each.title, estimate), (way, p))
    apart = [f"{way} ({title}: {found.value:+.3f})" for (title, found), (way, p) in compared.items() if p < 0.05]
    lams = [way for way in settings[0].nats if way.startswith("λ")]
    told = ("A₀ × 1/4", _DECAY, "‖A‖ kept")
    others = "; ".join(f"{way} {span(way)}" for way in told if way in settings[0].nats)
    seeds = tables.seeds_text(*(len(each.at_best["AdamW"]) for each in settings))
    return [
        f"* Small decoder ({'; '.join(each.title for each in settings)}; {seeds}): at each way's best rate, against "
        f"AdamW, {lams[0]} to {lams[-1].removeprefix('λ = ')} has {span(*lams)} nats per byte; {others}. Of "
        f"{len(compared)} comparisons, corrected within each setting, p < 0.05 have: {', '.join(apart) or 'none'}."
    ]


def _repeated(results: Path) -> dict[Group, list[Repeated]]:
    """Returns what was measured again, by setting; settings without any are left out."""
    pairs = ((group, by_cell, of_pilot(group)) for group, by_cell in by_setting(results).items())
    found = {group: repeated(by_cell, theirs) for group, by_cell, theirs in pairs if theirs}
    return {group: each for group, each in found.items() if each}


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


def _p_value(records: list[Record], baseline: list[Record]) -> float:
    """Returns the p value of "as many right answers", over seeds and questions."""
    ours, theirs = tables.by_seed(records), tables.by_seed(baseline)
    shared = [seed for seed in ours if seed in theirs]
    differences = np.stack([correctness(ours[seed]) - correctness(theirs[seed]) for seed in shared])
    return seeds_and_questions(differences)[1]


def _points(found: tables.Comparison) -> str:
    low, high = (100 * end for end in found.over_questions[1:])
    return f"{tables.percent(found.points)} points ({low:.1f} to {high:.1f})"


def _signed(found: tables.Comparison) -> str:
    return tables.number(found.nats, 3)
