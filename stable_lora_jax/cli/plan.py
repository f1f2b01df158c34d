"""``stable-lora plan``: does a training step fit a TPU slice or GPUs, how long does it take, what does a run cost."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax

from stable_lora_jax.finetune import DTYPES, check_choice, parse_mesh
from stable_lora_jax.locations import check_local
from stable_lora_jax.models import DecoderConfig, config_from_hf
from stable_lora_jax.models.huggingface import read_json
from stable_lora_jax.models.known_configs import KNOWN_CONFIGS
from stable_lora_jax.planning import Plan, Workload, has_compiler, parse_topology, plan_step
from stable_lora_jax.training import METHODS


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Compile the training step for a TPU slice or GPUs that need not be there, and say what it takes."""

    model: str = "llama-3.2-1b"
    """A known name (qwen2-0.5b, llama-3.2-3b, ...) or a Hugging Face directory, of which only config.json is read."""
    topology: str = "v5e:4x4"
    """A TPU slice: v4, v5e, v5p or v6e, and its shape; or 1 to 8 GPUs of a host: h100:1, h200:8, a100:4."""
    mesh: str = ""
    """Devices, e.g. data=4,fsdp=4; fsdp over all chips if empty."""
    batch: int = 64
    """Rows per step, over all chips."""
    length: int = 1024
    """Tokens per row."""
    targets_per_row: int | None = None
    """Predicted tokens per row; all of them if not given."""
    method: str = "stable-lora"
    """adamw, stable-lora, lora-plus, riemannian or lora-rite."""
    rank: int = 8
    """Rank r of the adapters."""
    targets: str = "qv"
    """Adapted modules: qv, qkvo, qkvogud, or a regular expression for dotted paths."""
    dtype: str = "bfloat16"
    """Of the base weights and the computation: float32 or bfloat16."""
    remat: bool = False
    """Recompute activations in the backward pass, to save memory."""
    accumulate: int = 1
    """Parts that each batch is processed in."""
    estimate: bool = False
    """Estimate even where a compiler is installed."""
    price_per_chip_hour: float | None = None
    """For the cost of the run; give --steps too."""
    steps: int | None = None
    """Steps of the run."""
    json: Path | None = None
    """Write the plan to this JSON file too."""

    def __post_init__(self):
        check_local(json=self.json)
        check_choice("method", self.method, METHODS)
        check_choice("dtype", self.dtype, tuple(DTYPES))
        if (self.price_per_chip_hour is None) != (self.steps is None):
            raise ValueError("The cost of a run takes both --price-per-chip-hour and --steps. Give both or neither.")
        if min(self.price_per_chip_hour or 0, self.steps or 0) < 0:
            raise ValueError(
                f"price_per_chip_hour={self.price_per_chip_hour} and steps={self.steps} must not be negative."
            )


class DoesNotFitError(ValueError):
    """The step does not fit the slice; the message says what to change."""


def plan_command(config: PlanConfig) -> Plan:
    """Runs `stable-lora plan` and returns the plan; see `PlanConfig`.

    Raises:
      DoesNotFitError: after everything was printed and written.
    """
    topology = parse_topology(config.topology)
    jax.config.update("jax_platforms", "cpu")  # only compiled for: no device is looked for
    workload = Workload(
        config=_model_config(config.model),
        rows=config.batch,
        length=config.length,
        num_targets=config.length if config.targets_per_row is None else config.targets_per_row,
        method=config.method,
        rank=config.rank,
        targets=config.targets,
        dtype=DTYPES[config.dtype],
        remat=config.remat,
        accumulate=config.accumulate,
    )
    sizes = parse_mesh(config.mesh) or {"fsdp": topology.chips}
    plan = plan_step(workload, topology, sizes, use_compiler=has_compiler(topology) and not config.estimate)
    record = {"model": config.model, **plan.to_json()}
    if config.steps is not None and config.price_per_chip_hour is not None:
        least, most = plan.run_cost(config.steps, config.price_per_chip_hour)
        record["run"] = {"steps": config.steps, "price_per_chip_hour": config.price_per_chip_hour}
        record["run"] |= {"cost": {"least": least, "most": most}}
    print(_table(record))
    if config.json:
        config.json.write_text(json.dumps(record, indent=1) + "\n")
    if not plan.fits:
        raise DoesNotFitError(
            f"{config.model} does not fit {topology}: a chip would hold {_gib(plan.memory)} of "
            f"{_gib(topology.chip.hbm)}. Change one of: " + "; ".join(plan.advice()) + "."
        )
    return plan


def _model_config(name: str) -> DecoderConfig:
    if name in KNOWN_CONFIGS:
        return KNOWN_CONFIGS[name]
    file = Path(name) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"model={name!r} is unknown. Known: {', '.join(KNOWN_CONFIGS)}, or a directory with a config.json."
        )
    return config_from_hf(read_json(file))


def _table(record: dict) -> str:
    memory, seconds, step = record["memory_per_chip"], record["seconds"], record["step"]
    share = memory["total"] / memory["available"]
    compiler = " ".join(f"{name} {number}" for name, number in record["versions"].items() if name != "jax")
    how = {
        "compiled": f"compiled for these devices by {compiler}",
        "estimate": "ESTIMATE: nothing was compiled for these devices",
    }[record["source"]]
    mesh = ", ".join(f"{name}={size}" for name, size in record["mesh"].items())
    rows = [
        ("model", f"{record['model']}, {step['dtype']}, {step['method']}, rank {step['rank']} on {step['targets']}"),
        ("slice", f"{record['topology']}, {record['chips']} chips; mesh {mesh}"),
        ("step", f"{step['rows']} rows of {step['length']} tokens, {step['targets_per_row']} predicted"),
        ("figures", how),
        ("parameters", f"{record['parameters']['trainable']:,} trainable, {record['parameters']['frozen']:,} frozen"),
        ("memory per chip", f"{_gib(memory['total'])} of {_gib(memory['available'])} ({share:.0%})"),
        ("", f"arguments {_gib(memory['arguments'])}, temporaries {_gib(memory['temporaries'])}"),
        ("", f"outputs {_gib(memory['outputs'])}, of which in place {_gib(memory['aliased'])}"),
        (
            "work per chip",
            f"{record['flops_per_chip'] / 1e12:.3f} TFLOP, {_gib(record['bytes_accessed_per_chip'])} moved",
        ),
        *(
            (
                "" if index else "collectives",
                f"{each['kind']} of {each['members']} chips: {each['runs']} runs, "
                f"{_gib(each['bytes'])}, {each['seconds'] * 1e3:.1f} ms",
            )
            for index, each in enumerate(record["collectives"])
        ),
        ("ms, each alone", ", ".join(f"{name} {value * 1e3:.1f}" for name, value in seconds.items())),
        ("binds", record["binds"]),
        ("seconds", "{least:.3f} if all overlaps, {most:.3f} if nothing does".format(**record["step_seconds"])),
        ("tokens per second", "{least:,.0f} to {most:,.0f}".format(**record["tokens_per_second"])),
    ]
    if run := record.get("run"):
        cost = "{least:,.2f} to {most:,.2f}".format(**run["cost"])
        rows.append(("cost", f"{cost} for {run['steps']:,} steps at {run['price_per_chip_hour']:g} per chip and hour"))
    return "\n".join(f"{name:<18}{value}" for name, value in rows)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
