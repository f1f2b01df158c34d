"""Makes every table and figure again from the raw lines: experiments/results/*.md and *.png, and the README's section.

Command:   make results            (or python -m experiments.make_results)
Hardware:  any. Minutes: 0.2.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments import ablation, bench_sweep, cot, dynamics, overhead, qa, targets, width_scaling, width_transformers

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
PAGES = EXPERIMENTS | {"bench_sweep": bench_sweep}  # measured by `make bench-sweep`
BEGIN, END = "<!-- results: made by `make results`, do not edit -->", "<!-- end of results -->"


@dataclass(frozen=True, kw_only=True)
class ResultsConfig:
    """Make tables and figures from the lines of all experiments."""

    results: Path = Path("experiments/results")
    """Folder of the lines."""
    readme: Path = Path("README.md")
    """Gets the tables of `shown` between its two markers."""
    shown: tuple[str, ...] = ("qa",)
    """Experiments whose tables the README shows; it links to the others."""


def sections(results: Path) -> dict[str, str]:
    """Returns experiment -> its tables in Markdown, of those that have lines; draws the figures."""
    made = {name: module.report(results) for name, module in PAGES.items()}
    return {name: text for name, text in made.items() if text}


def page(name: str, text: str) -> str:
    """Returns an experiment's page: what it asks, in its own words, and its tables."""
    record = (PAGES[name].__doc__ or "").strip()
    title, _, rest = record.partition("\n")
    return f"# {title}\n\n```\n{rest.strip()}\n```\n\n{text.strip()}\n"


def section(made: dict[str, str], results: Path, shown: tuple[str, ...]) -> str:
    """Returns the README's section."""
    parts = []
    for name, text in made.items():
        title = (PAGES[name].__doc__ or "").partition("\n")[0].rstrip(".")
        parts.append(f"[{title}]({(results / name).as_posix()}.md)")
        if name in shown:
            without_figures = re.sub(r"!\[.*?\]\(.*?\)\n*", "", text)
            parts.append(without_figures.strip())
    return "\n\n".join(parts)


def main(config: ResultsConfig) -> None:
    made = sections(config.results)
    for name, text in made.items():
        (config.results / f"{name}.md").write_text(page(name, text))
    before, _, rest = config.readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"{config.readme} lacks the lines {BEGIN!r} and {END!r}. Put them where the section belongs.")
    config.readme.write_text(f"{before}{BEGIN}\n{section(made, config.results, config.shown)}\n{END}{after}")
    print(f"Made {', '.join(made)}.")


if __name__ == "__main__":
    main(tyro.cli(ResultsConfig))
