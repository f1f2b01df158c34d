"""The fine-tuning methods by name, each an Optax transformation."""

import math

import jax
import optax

from stable_lora_jax.optim import lora_labels, lora_plus, lora_rite, riemannian_adamw, stable_lora_shrink
from stable_lora_jax.optim.hyperparameters import Number, check_range
from stable_lora_jax.optim.pairs import LORA_A, PyTree
from stable_lora_jax.optim.stable_lora import Lambda

# All leading axes of our adapters count layers. Said, because shapes alone do not tell where the rank is their number.
STACK_AXES = "leading"

METHODS = ("adamw", "stable-lora", "lora-plus", "riemannian", "lora-rite")
SCHEDULES = ("cosine", "linear", "constant")


def learning_rate_schedule(peak: Number, total_steps: int, warmup_steps: int, kind: str) -> optax.Schedule:
    """Returns the learning rate by step: linear from 0 to `peak` over the warm-up, then down to 0, or constant.

    Args:
      peak: the largest learning rate, >= 0.
      total_steps: steps of the whole run, warm-up included.
      warmup_steps: in [0, total_steps).
      kind: "cosine", "linear" or "constant".

    Raises:
      ValueError: an unknown kind, a warm-up as long as the run, a rate that is negative or not finite.
    """
    check_range("learning_rate", peak, 0, math.inf, "It is the largest rate of the schedule, e.g. 5e-4.")
    if kind not in SCHEDULES:
        raise ValueError(f"schedule={kind!r} is unknown. Known schedules: {', '.join(SCHEDULES)}.")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} is not in [0, total_steps={total_steps}). Warm up for fewer steps, or train "
            "for more."
        )
    decay_steps = total_steps - warmup_steps
    after = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[kind]
    if not warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


def make_optimizer(
    method: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    lam: Lambda | None = None,
    ratio: Number | None = None,
    weight_decay: Number,
    clip_norm: float,
    stop_when_stable: bool = True,
    decay_only_a: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Returns a method's whole update rule: clip the global gradient norm, then the method's step.

    LoRA-RITE clips the global norm in its own coordinates, to `clip_norm` too: that of the gradients depends on how the
    product is split into A and B.

    Args:
      method: one of `METHODS`.
      learning_rate: a number or a schedule.
      lam: λ of stable-lora, in [0, 1), or a schedule; the other methods have none.
      ratio: learning rate of B over that of A in lora-plus, >= 0; the other methods have none.
      weight_decay: decoupled weight decay, >= 0.
      clip_norm: largest global norm of the gradients, > 0; infinity clips nothing.
      stop_when_stable: False lets stable-lora shrink A to the end of the run (the paper's ablation).
      decay_only_a: weight decay acts on A alone, B keeps its size; for adamw and stable-lora.

    Raises:
      ValueError: an unknown method (the known ones are listed); a number out of range; `decay_only_a` with a method
        that does not offer it.
    """
    check_range("weight_decay", weight_decay, 0, math.inf, "0 switches it off.")
    if not clip_norm > 0:
        raise ValueError(f"clip_norm={clip_norm} is not above 0. Give inf to clip nothing.")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown. Known methods: {', '.join(METHODS)}.")
    for name, value, of in (("lam", lam, "stable-lora"), ("ratio", ratio, "lora-plus")):
        if value is None and method == of:
            raise ValueError(f"{name} is missing, and method={method!r} needs it.")
    if decay_only_a and method not in ("adamw", "stable-lora"):
        raise ValueError(f"decay_only_a is for adamw and stable-lora, not for {method}. Leave it out.")
    clip = optax.clip_by_global_norm(clip_norm)
    adamw = optax.adamw(learning_rate, weight_decay=weight_decay, mask=_is_a if decay_only_a else None)
    match method:
        case "adamw":
            return optax.chain(clip, adamw)
        case "stable-lora":
            assert lam is not None  # for the type checker
            shrink = stable_lora_shrink(lam, stack_axes=STACK_AXES, stop_when_stable=stop_when_stable)
            return optax.chain(clip, adamw, shrink)
        case "lora-plus":
            assert ratio is not None
            return optax.chain(clip, lora_plus(learning_rate, ratio, weight_decay=weight_decay, stack_axes=STACK_AXES))
        case "riemannian":
            return optax.chain(clip, riemannian_adamw(learning_rate, weight_decay=weight_decay, stack_axes=STACK_AXES))
        case _:
            limit = 0.0 if math.isinf(clip_norm) else clip_norm  # its 0 clips nothing
            return lora_rite(learning_rate, clip=limit, weight_decay=weight_decay, stack_axes=STACK_AXES)


def _is_a(params: PyTree) -> PyTree:
    """Returns True for every A, False for everything else."""
    return jax.tree.map(lambda label: label == LORA_A, lora_labels(params))
