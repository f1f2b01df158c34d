"""Every public transformation, for the tests that hold for each of them. Adding an optimizer means adding a row."""

import itertools
from collections.abc import Iterable
from typing import Any

import optax

from stable_lora_jax import (
    lora_plus,
    lora_rite,
    riemannian_adamw,
    scale_by_lora_rite,
    scale_by_riemannian,
    stable_lora,
    stable_lora_shrink,
)


def in_turns(*columns: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Returns the combinations of the first two columns, each with the next entry of the others in turn.

    A product of all columns takes minutes. This way every entry of the first two columns meets each other, and as many
    entries of the others as the other of the two has.
    """
    first, second, *others = map(list, columns)
    pairs = itertools.product(range(len(first)), range(len(second)))
    return [(first[i], second[j], *(other[(i + j) % len(other)] for other in others)) for i, j in pairs]


# name -> (transformation of a learning rate and what `find_pairs` takes, a learning rate at which it converges in 200
# steps). LoRA-RITE runs with a limit on its steps: without one B, small and of low rank at first, throws A far away,
# here and in the float64 specification alike.
ROWS = {
    "adamw + stable_lora_shrink": (lambda lr, **o: optax.chain(optax.adamw(lr), stable_lora_shrink(0.005, **o)), 3e-2),
    "stable_lora(adamw)": (lambda lr, **o: stable_lora(optax.adamw(lr), 0.005, **o), 3e-2),
    "lora_plus": (lambda lr, **o: lora_plus(lr, ratio=4.0, weight_decay=1e-3, **o), 2e-2),
    "scale_by_riemannian + sgd": (lambda lr, **o: optax.chain(scale_by_riemannian(1e-2, **o), optax.sgd(lr)), 1.0),
    "riemannian_adamw simultaneous": (lambda lr, **o: riemannian_adamw(lr, weight_decay=1e-3, **o), 3e-2),
    "riemannian_adamw sequential": (
        lambda lr, **o: riemannian_adamw(lr, ordering="sequential", eps=1e-6, bias_correction=False, **o),
        1e-2,
    ),
    "scale_by_lora_rite": (
        lambda lr, **o: optax.chain(
            scale_by_lora_rite(update_skipping=0.0, **o),
            optax.scale_by_learning_rate(lr),
            optax.clip_by_global_norm(0.3),
        ),
        2e-2,
    ),
    "lora_rite": (lambda lr, **o: lora_rite(lr, weight_decay=1e-3, update_skipping=0.0, max_step_a=0.1, **o), 2e-2),
    "lora_rite, every option": (
        lambda lr, **o: lora_rite(
            lr,
            update_capping=1.0,
            escape=True,
            balance=True,
            max_step_a=0.1,
            update_skipping=5.0,
            **o,
        ),
        2e-2,
    ),
    "stable_lora(lora_plus)": (lambda lr, **o: stable_lora(lora_plus(lr, ratio=4.0, **o), 0.005, **o), 2e-2),
    "stable_lora(riemannian_adamw)": (lambda lr, **o: stable_lora(riemannian_adamw(lr, **o), 0.005, **o), 3e-2),
    "stable_lora(lora_rite)": (
        lambda lr, **o: stable_lora(lora_rite(lr, update_skipping=0.0, max_step_a=0.1, **o), 0.005, **o),
        2e-2,
    ),
}
