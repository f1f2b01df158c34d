"""What a training step needs on a TPU slice or GPUs: found by compiling for them, or estimated, without one at hand."""

from stable_lora_jax.extras import needs

with needs("train"):
    from stable_lora_jax.planning.plan import Exchange, Plan, has_compiler, plan_step, topology_devices
    from stable_lora_jax.planning.program import Collective, read_collectives
    from stable_lora_jax.planning.topology import CHIPS, Chip, Topology, parse_topology
    from stable_lora_jax.planning.work import Work, compiled_work, estimated_work
    from stable_lora_jax.planning.workload import Workload, lower

__all__ = [
    "CHIPS",
    "Chip",
    "Collective",
    "Exchange",
    "Plan",
    "Topology",
    "Work",
    "Workload",
    "compiled_work",
    "estimated_work",
    "has_compiler",
    "lower",
    "parse_topology",
    "plan_step",
    "read_collectives",
    "topology_devices",
]
