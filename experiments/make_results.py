"""Makes every table and figure again from what was measured: the pages of results, and blocks of README and docs.

Command:   make results            (or python -m experiments.make_results)
Hardware:  any. Minutes: 0.3.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments import demo, findings, gpu_day, verdict
from experiments.benchmarks import (
    bench_epoch,
    bench_optimizers,
    bench_packing,
    bench_sweep,
    bench_train,
    overhead,
    plan_tables,
    quantize,
    unrolling,
)
from experiments.studies import (
    ablation,
    cot,
    dynamics,
    peft_comparison,
    pilot,
    qa,
    qa_tables,
    rates,
    small_decoder,
    targets,
    width_scaling,
    width_transformers,
)

EXPERIMENTS = {
    "gpu_day": gpu_day,
    "rates": rates,
    "small_decoder": small_decoder,
    "qa": qa,
    "ablation": ablation,
    "dynamics": dynamics,
    "targets": targets,
    "cot": cot,
    "peft_comparison": peft_comparison,
    "overhead": overhead,
    "width_scaling": width_scaling,
    "width_transformers": width_transformers,
}
PAGES = (
    {"pilot": pilot} | EXPERIMENTS | {"bench_sweep": bench_sweep, "quantize": quantize, "plan": plan_tables}
)  # each has a command
# block -> (what makes its table, the file it is made from)
TABLES = {
    "demo": (demo.table, "demo.json"),
    "bench_train": (bench_train.table, "bench_train.json"),
    "bench_packing": (bench_packing.table, "bench_packing.json"),
    "bench_epoch": (bench_epoch.table, "bench_epoch.json"),
    "bench_optimizers": (bench_optimizers.short_table, "bench_optimizers.json"),
    "unrolling": (unrolling.table, "unrolling.json"),
}
DOCUMENTS = (Path("README.md"), Path("docs/findings.md"), Path("docs/cost.md"), Path("docs/devices.md"))
_BLOCK = re.compile(r"(<!-- (\w+): made by `make results`, do not edit -->\n)(.*?)(<!-- end of \2 -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ResultsConfig:
    """Make tables and figures from the lines of all experiments."""

    results: Path = Path("experiments/results")
    """Folder of the lines."""
    documents: tuple[Path, ...] = DOCUMENTS
    """Get the blocks that stand between their markers."""


def sections(results: Path) -> dict[str, str]:
    """Returns experiment -> its tables in Markdown, of those that have lines; draws the figures."""
    made = {name: module.report(results) for name, module in PAGES.items()}
    return {name: text for name, text in made.items() if text}


def page(name: str, text: str) -> str:
    """Returns an experiment's page: what it asks, in its own words, and its tables."""
    record = (PAGES[name].__doc__ or "").strip()
    title, _, rest = record.partition("\n")
    return f"# {title}\n\n```\n{rest.strip()}\n```\n\n{text.strip()}\n"


def blocks(made: dict[str, str], results: Path) -> dict[str, str]:
    """Returns name -> Markdown of every block that a document may hold."""
    tables = {name: make(json.loads((results / file).read_text())) for name, (make, file) in TABLES.items()}
    told = {
        "verdict": verdict.verdict(results),
        "methods": verdict.table(results),
        "findings": findings.details(results),
    }
    return tables | told | {"qa": qa_tables.short(results), "results": list_of_pages(made)}


def filled(text: str, blocks: dict[str, str]) -> str:
    """Returns a document with its blocks made again."""
    return _BLOCK.sub(lambda found: f"{found[1]}{blocks[found[2]].strip()}\n{found[4]}", text)


def list_of_pages(made: dict[str, str]) -> str:
    """Returns the documentation's list of pages."""
    titles = {name: (PAGES[name].__doc__ or "").partition("\n")[0].rstrip(".") for name in made}
    return "\n".join(f"* [{title}](results/{name}.md)" for name, title in titles.items())


def main(config: ResultsConfig) -> None:
    made = sections(config.results)
    for name, text in made.items():
        (config.results / f"{name}.md").write_text(page(name, text))
    made_again = blocks(made, config.results)
    for document in config.documents:
        document.write_text(filled(document.read_text(), made_again))
    print(f"Made {', '.join(made)}.")


if __name__ == "__main__":
    main(tyro.cli(ResultsConfig))
