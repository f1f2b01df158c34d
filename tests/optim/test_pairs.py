"""What counts as a pair: names, containers, layouts, and every refusal."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

from stable_lora_jax import lora_labels, stable_lora_shrink
from stable_lora_jax.optim.pairs import find_pairs

A, B, HOLE = jnp.ones((16, 4)), jnp.ones((4, 8)), optax.MaskedNode()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    lora_a: jax.Array
    lora_b: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    weight: jax.Array
    bias: jax.Array | None


def names(tree, **kwargs):
    return [pair.name for pair in find_pairs(tree, **kwargs)]


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"q": {"kernel": A, "lora_a": A, "lora_b": B}}, ["q/lora"]),
        ({"q": {"lora_A": A, "lora_B": B}}, ["q/lora"]),
        ({"q": {"lora_A": {"weight": A}, "lora_B": {"weight": B}}}, ["q/lora/weight"]),
        ({"m.0.q.lora_A.weight": A, "m.0.q.lora_B.weight": B}, ["m.0.q.lora.weight"]),
        ({"m.q.lora_A.default.weight": A, "m.q.lora_B.default.weight": B}, ["m.q.lora.default.weight"]),
        ({"q": {"kernel_lora_a": A, "kernel_lora_b": B}}, ["q/kernel_lora"]),
        ({"q": {"lora_kernel_a": A, "lora_kernel_b": B}}, ["q/lora_kernel"]),
        ([{"lora_a": A, "lora_b": B}, {"lora_a": A, "lora_b": B}], ["0/lora", "1/lora"]),
        (FrozenDict({"q": {"lora_a": A, "lora_b": B}, "bias": B}), ["q/lora"]),
        ((Layer(A, B), A), ["0/lora"]),
        ({"q": {"lora_a": A, "lora_b": B}, "v": {"lora_a": HOLE, "lora_b": HOLE}}, ["q/lora"]),
        ({"q": {"lora_a": A, "lora_b": B, "kernel": None}}, ["q/lora"]),
        ({"lora_alpha": A, "lora_a": A, "lora_b": B}, ["lora"]),
        ({"q": {"w": A, "lora": {"a": A, "b": B}}}, ["q/lora"]),  # google/gemma
        ({"u.lora_down.weight": A.T, "u.lora_up.weight": B.T, "u.alpha": A[0, 0]}, ["u.lora.weight"]),  # kohya
        ({("q", "lora_a"): A, ("q", "lora_b"): B, ("q", "kernel"): A}, ["q/lora"]),  # flatten_dict
        ({"q": {"lora_A": A, "lora_B": B, "lora_scaling": A[0], "lora_ranks": A[0]}}, ["q/lora"]),  # SkyRL
        ({"q": {"lora_a.kernel": A, "lora_b.kernel": B}}, ["q/lora.kernel"]),  # MaxText
        (
            {"mlp": {"gating_einsum": A, "gating_einsum_lora_a": A[None], "gating_einsum_lora_b": B[None]}},
            ["mlp/gating_einsum_lora"],  # openpi
        ),
        ({"lora": {"lora_A": Linear(A.T, None), "lora_B": Linear(B.T, None)}}, ["lora/lora/weight"]),  # levanter
        ({"lora_A.weight": A.T, "lora_B.weight": B.T, "lora_B.bias": B[0]}, ["lora.weight"]),  # PEFT's lora_bias
    ],
)  # fmt: skip
def test_pairs_are_found_by_name_in_any_container(tree, expected):
    assert names(tree) == expected


@pytest.mark.parametrize("layers", [5, 4])  # 4 is the rank too
def test_a_bias_beside_a_stacked_kernel_is_in_no_pair(layers):
    shapes = {"lora_a": {"kernel": (32, 4), "bias": (4,)}, "lora_b": {"kernel": (4, 16), "bias": (16,)}}
    params = {side: {name: jnp.ones((layers, *shape)) for name, shape in each.items()} for side, each in shapes.items()}
    (pair,) = find_pairs(params, stack_axes=(0,))
    assert (pair.name, pair.fan_ratio) == ("lora/kernel", 2.0)


def test_layers_of_known_projects_are_read_as_they_are_meant():
    def read(a, b, **options):
        (pair,) = find_pairs({"lora_a": jnp.ones(a), "lora_b": jnp.ones(b)}, **options)
        return pair.stack_axes, pair.rank_axes, pair.fan_ratio

    # openpi: eighteen scanned layers of eight heads, which have an A and a B each
    assert read((18, 8, 64, 16), (18, 8, 16, 32)) == ((0, 1), (3, 2), 2.0)
    # MaxText: layers along axis 1; queries, and the projection back from the heads
    assert read((64, 3, 4), (4, 3, 2, 8), stack_axes=(1,)) == ((1,), (2, 0), 4.0)
    assert read((2, 3, 8, 4), (4, 3, 64), stack_axes=(1,)) == ((1,), (3, 0), 0.25)
    with pytest.raises(ValueError, match=r"ambiguous: A \(64, 3, 4\) and B \(4, 3, 2, 8\)"):
        read((64, 3, 4), (4, 3, 2, 8))
    # levanter: torch's orientation, layers first, and several axes of heads
    levanter = {"lora_A": {"weight": jnp.ones((3, 4, 64))}, "lora_B": {"weight": jnp.ones((3, 2, 5, 8, 4))}}
    (pair,) = find_pairs(levanter)
    assert (pair.stack_axes, pair.rank_axes, pair.fan_ratio) == ((0,), (1, 4), 64 / 80)


def test_a_variable_and_its_bare_array_have_the_same_name():
    model = nnx.List([nnx.LoRALinear(16, 8, lora_rank=4, rngs=nnx.Rngs(0))])
    state = nnx.state(model, nnx.LoRAParam)
    assert names(state) == names(nnx.as_pure(state)) == ["0/lora/lora"]


def test_labels_have_the_tree_of_the_parameters():
    params = {"layer": {"kernel": A, "lora_a": A, "lora_b": B}, "head": [A]}
    labels = lora_labels(params)
    assert labels == {"layer": {"kernel": "other", "lora_a": "lora_a", "lora_b": "lora_b"}, "head": ["other"]}
    tx = optax.partition(
        {"lora_a": optax.sgd(1.0), "lora_b": optax.sgd(2.0), "other": optax.set_to_zero()}, lora_labels
    )
    updates, _ = tx.update(params, tx.init(params), params)
    assert (updates["layer"]["lora_a"][0, 0], updates["layer"]["lora_b"][0, 0], updates["head"][0][0, 0]) == (-1, -2, 0)


def test_other_names_are_paired_by_the_smallest_shared_subtree():
    params = {"x": {"down": {"w": A}, "up": {"w": B}, "kernel": A}, "y": {"down": {"w": A}, "up": {"w": B}}}
    labels = {"x": {"down": "lora_a", "up": "lora_b", "kernel": "other"}, "y": {"down": "lora_a", "up": "lora_b"}}
    assert names(params, labels=labels) == names(params, labels=lambda _: labels) == ["x/down/w", "y/down/w"]
    assert [(pair.a, pair.b) for pair in find_pairs(params, labels=labels)] == [(0, 2), (3, 4)]


def test_labels_need_none_for_a_hole():
    params = {"q": {"kernel": None, "down": jnp.ones((4, 2)), "up": jnp.ones((2, 4))}}
    labels = {"q": {"kernel": None, "down": "lora_a", "up": "lora_b"}}
    assert names(params, labels=labels) == ["q/down"]


@pytest.mark.parametrize(
    ("a", "b", "stack_axes", "expected"),
    [
        ((16, 4), (4, 8), "infer", ()),
        ((4, 16), (8, 4), "infer", ()),  # torch
        ((16, 4), (4, 16), "infer", ()),
        ((16, 4), (4, 2, 8), "infer", ()),  # einsum: query projection
        ((2, 8, 4), (4, 16), "infer", ()),  # einsum: output projection
        ((3, 16, 4), (3, 4, 8), "infer", (0,)),
        ((3, 4, 16), (3, 8, 4), "infer", (0,)),  # torch
        ((16, 4, 3), (4, 8, 3), "infer", (2,)),
        ((3, 16, 4), (3, 4, 2, 8), "infer", (0,)),
        ((3, 5, 16, 4), (3, 5, 4, 8), "infer", (0, 1)),
        ((16, 3, 4), (4, 3, 8), (1,), (1,)),
        ((16, 3, 4), (4, 3, 8), (), ()),
        ((4, 16, 4), (4, 4, 8), (0,), (0,)),
        ((4, 16, 4), (4, 4, 8), "leading", (0,)),  # as many layers as ranks
        ((3, 5, 16, 4), (3, 5, 4, 8), "leading", (0, 1)),
        ((16, 4), (4, 8), "leading", ()),
        ((16, 4), (4, 8), (1,), ()),  # a plain pair beside stacked ones
        ((16, 3, 4), (4, 3, 8), lambda name: (1,) if name == "q/lora" else (), (1,)),
    ],
)
def test_stack_axes(a, b, stack_axes, expected):
    params = {"q": {"lora_a": jnp.ones(a), "lora_b": jnp.ones(b)}}
    (pair,) = find_pairs(params, stack_axes=stack_axes)
    assert pair.stack_axes == expected
    assert pair.fan_ratio == pytest.approx(jnp.ones(a).size / jnp.ones(b).size)


@pytest.mark.parametrize(("a", "b"), [((4, 16, 4), (4, 4, 8)), ((16, 3, 4), (4, 3, 8))])
def test_an_ambiguous_layout_must_be_said(a, b):
    params = {"q": {"lora_a": jnp.ones(a), "lora_b": jnp.ones(b)}}
    with pytest.raises(ValueError, match=r"pair 'q/lora' is ambiguous.*Say which by stack_axes="):
        stable_lora_shrink(0.1).init(params)


@pytest.mark.parametrize(
    ("params", "kwargs", "error", "message"),
    [
        ({"q": {"kernel": A}}, {}, ValueError, r"No LoRA adapter found among .* \['q/kernel'\].*pass labels="),
        ({"q": {"lora_a": A}}, {}, ValueError, r"A without its B: \['q/lora_a'\]; B without its A: \[\]"),
        ({"q": {"lora_b": B}}, {}, ValueError, r"A without its B: \[\]; B without its A: \['q/lora_b'\]"),
        (
            {"q": {"lora_a": A}, "v": {"lora_b": B}}, {}, ValueError,
            r"A without its B: \['q/lora_a'\]; B without its A: \['v/lora_b'\]",
        ),
        (
            {"q": [A, A, B]}, {"labels": {"q": ["lora_a", "lora_a", "lora_b"]}}, ValueError,
            r"A without its B: \['q/0', 'q/1'\]; B without its A: \['q/2'\]",
        ),
        ({"q": {"lora_a": A, "lora_b": B.T}}, {}, ValueError, r"ranks of the pair 'q/lora' disagree: A .*\(16, 4\)"),
        ({"q": {"lora_a": A[0], "lora_b": B}}, {}, ValueError, r"'q/lora_a'\] has shape \(.,\).*label it 'other'"),
        (
            {"q": {"lora_a": jnp.ones((3, 16, 4)), "lora_b": jnp.ones((3, 4, 8))}}, {"stack_axes": (1,)}, ValueError,
            r"stack_axes=\(1,\) does not fit the pair 'q/lora'.*possible are \(0,\)",
        ),
        *(
            (
                {"q": {"lora_a": A, "lora_b": B}}, {"stack_axes": lambda name, axes=axes: axes}, ValueError,
                rf"stack_axes={axes!r} is unknown \(pair 'q/lora'\). Give 'infer', 'leading', a tuple of axes such as",
            )
            for axes in (0, "trailing", "")
        ),
        ({"q": {"lora_a": A.astype(int), "lora_b": B}}, {}, TypeError, r"'q/lora_a'.* is int32.*floating dtype"),
        ({"q": {"lora_a": "x", "lora_b": B}}, {}, TypeError, r"'q/lora_a'.* is a str"),
        ({"q": A}, {"labels": {"q": "A"}}, ValueError, r"labels holds \['A'\]. Each label must be one of 'lora_a'"),
        ({"q": A, "v": B}, {"labels": {"q": "lora_a"}}, ValueError, r"labels has no entry for the parameter \['v'\]"),
    ],
)  # fmt: skip
def test_errors_say_what_came_and_what_to_do(params, kwargs, error, message):
    with pytest.raises(error, match=message):
        stable_lora_shrink(0.1, **kwargs).init(params)
