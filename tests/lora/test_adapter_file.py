"""Adapter files: what is saved comes back, and only onto the model it belongs to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from stable_lora_jax.lora import (
    AdapterSpec,
    inject_lora,
    inject_peft,
    load_adapter,
    lora_modules,
    read_adapter_spec,
    save_adapter,
    save_peft,
)
from tests.lora.test_injection import decoder, randomized


def adapted(rank=2, alpha=4.0, targets="qv", seed=1, **kwargs):
    model, tokens = decoder()
    return inject_lora(model, rank, alpha, targets, rngs=nnx.Rngs(seed), **kwargs), tokens


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip_is_bitwise(tmp_path, dtype):
    model, tokens = adapted(dtype=dtype)
    randomized(model)
    save_adapter(tmp_path / "new" / "adapter.safetensors", model, "tiny")
    other, _ = adapted(seed=9, dtype=dtype)
    load_adapter(tmp_path / "new" / "adapter.safetensors", other, "tiny")
    np.testing.assert_array_equal(other(tokens), model(tokens))
    assert lora_modules(other)["layers.self_attn.q_proj"].lora_a.dtype == dtype
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["adapter.safetensors"]


def test_the_spec_says_how_to_make_room(tmp_path):
    model, _ = adapted(rank=3, alpha=5.0, use_rslora=True)
    save_adapter(tmp_path / "a", model, "tiny")
    spec = read_adapter_spec(tmp_path / "a")
    targets = ("layers.self_attn.q_proj", "layers.self_attn.v_proj")
    assert spec == AdapterSpec(base="tiny", rank=3, alpha=5.0, use_rslora=True, targets=targets)
    again, _ = decoder()
    inject_lora(again, spec.rank, spec.alpha, spec.targets, rngs=nnx.Rngs(2), use_rslora=spec.use_rslora)
    load_adapter(tmp_path / "a", again, spec.base + "/")


@pytest.mark.parametrize(
    ("kwargs", "base", "message"),
    [
        ({"rank": 4}, "tiny", "rank: file 2, model 4"),
        ({"alpha": 8.0}, "tiny", "alpha: file 4.0, model 8.0"),
        ({"use_rslora": True}, "tiny", "use_rslora: file False, model True"),
        ({"targets": "qkvo"}, "tiny", "targets: file"),
        ({}, "other", "base: file 'tiny', model 'other'"),
    ],
)
def test_another_model_is_refused_and_left_alone(tmp_path, kwargs, base, message):
    save_adapter(tmp_path / "a", randomized(adapted()[0]), "tiny")
    model, _ = adapted(**kwargs)
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.LoRAParam))
    with pytest.raises(ValueError, match=f"does not belong to this model.*{message}"):
        load_adapter(tmp_path / "a", model, base)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.LoRAParam), before)


def test_files_that_are_no_adapters(tmp_path):
    model, _ = adapted()
    with pytest.raises(ValueError, match=r"There is no adapter file .*missing"):
        load_adapter(tmp_path / "missing", model, "tiny")
    save_file({"x": np.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="not an adapter that save_adapter wrote"):
        load_adapter(tmp_path / "foreign", model, "tiny")
    save_adapter(tmp_path / "whole", model, "tiny")
    (tmp_path / "half").write_bytes((tmp_path / "whole").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half is not a readable safetensors file .*truncated"):
        load_adapter(tmp_path / "half", model, "tiny")
    with safe_open(tmp_path / "whole", framework="numpy") as file:
        save_file({"x": np.zeros(3)}, tmp_path / "emptied", metadata=file.metadata())
    with pytest.raises(ValueError, match=r"emptied lacks what its targets name .*Copy it again"):
        load_adapter(tmp_path / "emptied", model, "tiny")


@pytest.mark.parametrize(
    "header", ["{", "[]", "{}", '{"base": 1, "rank": "x", "alpha": 1, "use_rslora": 0, "targets": 3}']
)
def test_a_header_of_others_is_refused(tmp_path, header):
    save_file({"x": np.zeros(3)}, tmp_path / "a", metadata={"stable_lora_jax": header})
    with pytest.raises(ValueError, match=r"has a header that save_adapter did not write"):
        read_adapter_spec(tmp_path / "a")


def test_an_adapter_that_is_not_finite_is_refused(tmp_path):
    model = randomized(adapted()[0])
    module = next(iter(lora_modules(model).values()))
    module.lora_b[...] = module.lora_b[...].at[0, 0].set(jnp.nan)
    save_adapter(tmp_path / "a", model, "tiny")
    with pytest.raises(ValueError, match=r"lora_b holds NaN or infinity in .*The training that wrote it has failed"):
        load_adapter(tmp_path / "a", adapted()[0], "tiny")


def test_a_model_without_adapters_or_with_two_kinds_has_no_spec(tmp_path):
    model, _ = decoder()
    with pytest.raises(ValueError, match=r"has no LoRA adapters\. Call inject_lora"):
        save_adapter(tmp_path / "a", model, "tiny")
    model, _ = adapted()
    lora_modules(model)["layers.self_attn.q_proj"].use_rslora = True
    with pytest.raises(ValueError, match=r"adapters with rslora and without\. An adapter file holds one kind"):
        save_adapter(tmp_path / "a", model, "tiny")


def test_several_ranks_and_alphas_come_back(tmp_path):
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {r"layers\.mlp\.(down|up).*": 8.0, "q_proj": 1.5}}
    model = inject_lora(decoder()[0], 2, 4.0, "qkvogud", rngs=nnx.Rngs(1), **patterns)
    save_adapter(tmp_path / "a", model, "tiny")
    spec = read_adapter_spec(tmp_path / "a")
    assert (spec.rank, spec.alpha, spec.ranks) == (2, 4.0, {"layers.self_attn.q_proj": 3})
    assert spec.alphas == {"layers.self_attn.q_proj": 1.5} | {f"layers.mlp.{name}_proj": 8.0 for name in ("down", "up")}
    again = decoder()[0]
    inject_lora(
        *(again, spec.rank, spec.alpha, spec.targets),
        rngs=nnx.Rngs(5),
        rank_pattern=spec.rank_pattern,
        alpha_pattern=spec.alpha_pattern,
    )
    load_adapter(tmp_path / "a", again, "tiny")
    for path, module in lora_modules(model).items():
        other = lora_modules(again)[path]
        assert (module.rank, module.alpha, module.scale) == (other.rank, other.alpha, other.scale)
        np.testing.assert_array_equal(module.lora_a[...], other.lora_a[...])
    with pytest.raises(ValueError, match="does not belong to this model"):
        load_adapter(tmp_path / "a", inject_lora(decoder()[0], 2, 4.0, "qkvogud", rngs=nnx.Rngs(1)), "tiny")


def test_a_layer_named_as_another_one_ends_is_told_apart(tmp_path):
    def model():
        return nnx.Dict(
            dense=nnx.Linear(4, 4, rngs=nnx.Rngs(0)), block=nnx.Dict(dense=nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
        )

    source = randomized(inject_lora(model(), 2, 4.0, r"dense", rngs=nnx.Rngs(1)))
    save_adapter(tmp_path / "a", source, "mine")
    again = inject_lora(model(), 2, 4.0, read_adapter_spec(tmp_path / "a").targets, rngs=nnx.Rngs(2))
    assert list(lora_modules(again)) == ["dense"]
    load_adapter(tmp_path / "a", again, "mine")
    np.testing.assert_array_equal(again["dense"].lora_b[...], source["dense"].lora_b[...])
    save_peft(tmp_path / "peft", source, "mine", lambda path, layer: path)
    other = model()
    assert inject_peft(tmp_path / "peft", other, "mine", lambda path, layer: path) == 1
    assert list(lora_modules(other)) == ["dense"]
