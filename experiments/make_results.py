"""Makes every table and figure again from what was measured: experiments/results/*.md and *.png, the README's tables.

Command:   make results            (or python -m experiments.make_results)
Hardware:  any. Minutes: 0.3.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments import (
    ablation,
    bench_optimizers,
    bench_sweep,
    bench_train,
    cot,
    demo,
    dynamics,
    overhead,
    plan_tables,
    qa,
    qa_tables,
    quantize,
    targets,
    width_scaling,
    width_transformers,
)

EXPERIMENTS = {
    "qa": qa,
    "ablation": ablation,
    "dynamics": dynamics,
    "targets": targets,
    "cot": cot,
    "overhead": overhead,
    "width_scaling": width_scaling,
    "width_transformers": width_transformers,
}
PAGES = EXPERIMENTS | {"bench_sweep": bench_sweep, "quantize": quantize, "plan": plan_tables}  # each has a command
# README block -> (what makes its table, the file it is made from)
TABLES = {
    "demo": (demo.table, "demo.json"),
    "bench_train": (bench_train.table, "bench_train.json"),
    "bench_optimizers": (bench_optimizers.short_table, "bench_optimizers.json"),
}


@dataclass(frozen=True, kw_only=True)
class ResultsConfig:
    """Make tables and figures from the lines of all experiments."""

    results: Path = Path("experiments/results")
    """Folder of the lines."""
    readme: Path = Path("README.md")
    """Gets tables between its markers."""


def sections(results: Path) -> dict[str, str]:
    """Returns experiment -> its tables in Markdown, of those that have lines; draws the figures."""
    made = {name: module.report(results) for name, module in PAGES.items()}
    return {name: text for name, text in made.items() if text}


def page(name: str, text: str) -> str:
    """Returns an experiment's page: what it asks, in its own words, and its tables."""
    record = (PAGES[name].__doc__ or "").strip()
    title, _, rest = record.partition("\n")
    return f"# {title}\n\n```\n{rest.strip()}\n```\n\n{text.strip()}\n"


def readme(text: str, made: dict[str, str], results: Path) -> str:
    """Returns the README with its tables made again."""
    blocks = {name: make(json.loads((results / file).read_text())) for name, (make, file) in TABLES.items()}
    blocks |= {"qa": qa_tables.short(results), "results": section(made, results)}
    for name, block in blocks.items():
        begin, end = f"<!-- {name}: made by `make results`, do not edit -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        if not after:
            raise ValueError(f"The README lacks the lines {begin!r} and {end!r}. Put them where the table belongs.")
        text = f"{before}{begin}\n{block.strip()}\n{end}{after}"
    return text


def section(made: dict[str, str], results: Path) -> str:
    """Returns the README's list of pages."""
    titles = {name: (PAGES[name].__doc__ or "").partition("\n")[0].rstrip(".") for name in made}
    return "\n".join(f"* [{title}]({(results / name).as_posix()}.md)" for name, title in titles.items())


def main(config: ResultsConfig) -> None:
    made = sections(config.results)
    for name, text in made.items():
        (config.results / f"{name}.md").write_text(page(name, text))
    config.readme.write_text(readme(config.readme.read_text(), made, config.results))
    print(f"Made {', '.join(made)}.")


if __name__ == "__main__":
    main(tyro.cli(ResultsConfig))
