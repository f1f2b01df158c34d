"""The fine-tuning methods by name, each an Optax transformation."""

import optax

from stable_lora_jax.optim import stable_lora_shrink

METHODS = ("adamw", "stable-lora")
SCHEDULES = ("cosine", "linear", "constant")


def learning_rate_schedule(peak: float, total_steps: int, warmup_steps: int, kind: str) -> optax.Schedule:
    """Returns the learning rate by step: linear from 0 to `peak` over the warm-up, then down to 0, or constant.

    Args:
      peak: the largest learning rate, > 0.
      total_steps: steps of the whole run, warm-up included.
      warmup_steps: in [0, total_steps).
      kind: "cosine", "linear" or "constant".

    Raises:
      ValueError: an unknown kind, or a warm-up as long as the run.
    """
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
    method: str, learning_rate: optax.ScalarOrSchedule, *, lam: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformationExtraArgs:
    """Returns a method's whole update rule: clip the global gradient norm, AdamW, and what the method adds.

    Args:
      method: one of `METHODS`.
      learning_rate: a number or a schedule.
      lam: λ of stable-lora, in [0, 1); the other methods do not use it.
      weight_decay: decoupled weight decay of AdamW, >= 0.
      clip_norm: largest global norm of the gradients, > 0.

    Raises:
      ValueError: an unknown method (the known ones are listed); λ out of range.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown. Known methods: {', '.join(METHODS)}.")
    links = [optax.clip_by_global_norm(clip_norm), optax.adamw(learning_rate, weight_decay=weight_decay)]
    if method == "stable-lora":
        links.append(stable_lora_shrink(lam))
    return optax.chain(*links)
