"""Adapters in some of a model's layers alone: PEFT's layers_to_transform."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from stable_lora_jax import optim
from stable_lora_jax.cli import main
from stable_lora_jax.lora import inject_lora, inject_peft, load_adapter, lora_modules, save_adapter, save_peft
from stable_lora_jax.lora.peft_files import CONFIG, WEIGHTS, is_adapted
from stable_lora_jax.models import huggingface_module, load_model, save_huggingface
from tests.models import tiny

BASE, TOKENS = "owner/Tiny-Model", tiny.tokens()


def adapted(layers=(0, 2), targets=("q_proj", "down_proj")):
    init = nnx.initializers.normal(0.3)
    return inject_lora(
        tiny.decoder(), 2, 4, targets, rngs=nnx.Rngs(1), b_init=init, a_init=init, layers_to_transform=layers
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.chain(optax.adamw(1e-2), optim.stable_lora_shrink(0.1)),
        lambda: optim.lora_plus(1e-2, 4.0),
        lambda: optim.riemannian_adamw(1e-2),
        lambda: optim.lora_rite(1e-2),
    ],
    ids=["stable-lora", "lora-plus", "riemannian", "lora-rite"],
)
def test_the_others_stay_as_they_are_with_every_optimizer(make):
    model = adapted()
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.LoRAParam)
    before = {path: np.array(param[...]) for path, param in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))}

    @nnx.jit
    def step(model, optimizer):
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(TOKENS) ** 2), argnums=wrt)(model))

    for _ in range(3):
        step(model, optimizer)
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        assert not param[...][1].any(), path
        for layer in (0, 2):
            assert (param[...][layer] != before[path][layer]).all(), (path, layer)


def test_it_is_the_model_whose_other_layers_have_none():
    some = adapted()
    every = inject_lora(tiny.decoder(), 2, 4, ("q_proj", "down_proj"), rngs=nnx.Rngs(1))
    for path, module in lora_modules(some).items():
        other = lora_modules(every)[path]
        other.lora_a[...], other.lora_b[...] = module.lora_a[...].at[1].set(7.0), module.lora_b[...]
    np.testing.assert_array_equal(tiny.call(some, TOKENS), tiny.call(every, TOKENS))
    fresh = inject_lora(tiny.decoder(), 2, 4, "qv", rngs=nnx.Rngs(1), layers_to_transform=[1])
    np.testing.assert_array_equal(tiny.call(fresh, TOKENS), tiny.call(tiny.decoder(), TOKENS))
    assert jax.tree.all(jax.tree.map(lambda x: not x[::2].any(), nnx.as_pure(nnx.state(fresh, nnx.LoRAParam))))


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([3], {}, "has the layers 0 to 2"),
        ([-1], {}, "has the layers 0 to 2"),
        ([], {}, "at least one layer, and each once"),
        ([1, 1], {}, "at least one layer, and each once"),
        ([1], {"targets": "lm_head"}, "lm_head is not a stack of layers"),
        ([1], {"use_dora": True}, "magnitudes would be trained in all layers"),
    ],
)
def test_what_cannot_be_is_refused(layers, options, message):
    model = tiny.decoder()
    with pytest.raises(ValueError, match=message):
        inject_lora(model, 2, 4, **({"targets": "qv"} | options), rngs=nnx.Rngs(0), layers_to_transform=layers)
    assert not lora_modules(model)


def test_files_keep_it_and_a_peft_directory_holds_no_zeros(tmp_path):
    model = adapted()
    save_peft(tmp_path / "peft", model, BASE, huggingface_module)
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    assert {key.split(".")[4] for key in tensors} == {"0", "2"}
    targets = json.loads((tmp_path / "peft" / CONFIG).read_text())["target_modules"]
    assert targets == sorted(
        f"model.layers.{i}.{name}" for i in (0, 2) for name in ("self_attn.q_proj", "mlp.down_proj")
    )
    again = tiny.decoder()
    assert inject_peft(tmp_path / "peft", again, BASE, huggingface_module) == 4
    save_adapter(tmp_path / "a.safetensors", model, BASE)
    from_file = inject_lora(tiny.decoder(), 2, 4, ("q_proj", "down_proj"), rngs=nnx.Rngs(5))
    load_adapter(tmp_path / "a.safetensors", from_file, BASE)
    for other in (again, from_file):
        np.testing.assert_array_equal(tiny.call(other, TOKENS), tiny.call(model, TOKENS))


def test_a_file_that_lacks_a_layer_by_damage_is_still_refused(tmp_path):
    save_peft(tmp_path / "peft", adapted((0, 1, 2)), BASE, huggingface_module)
    file, config = tmp_path / "peft" / WEIGHTS, tmp_path / "peft" / CONFIG
    save_file({key: value for key, value in load_file(file).items() if ".layers.1." not in key}, file)
    with pytest.raises(ValueError, match=r"lacks the matrices of model.layers.1.mlp.down_proj, model"):
        inject_peft(tmp_path / "peft", tiny.decoder(), BASE, huggingface_module)
    for said in ({"layers_to_transform": [0, 2]}, {"exclude_modules": r".*\.1\..*"}):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_to_transform": None} | said))
        assert inject_peft(tmp_path / "peft", tiny.decoder(), BASE, huggingface_module) == 4
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_to_transform": ["0"]}))
    with pytest.raises(ValueError, match=r"layers_to_transform=.*It must be a list of int, one, or null"):
        inject_peft(tmp_path / "peft", tiny.decoder(), BASE, huggingface_module)


CASES = [
    {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj"]},
    {"target_modules": r"model\.layers\.[02]\.self_attn\.(q|v)_proj"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "up_proj", "lm_head"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.mlp.up_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.0.*"},
]


@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT about themselves
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_real_peft_adapts_the_same_modules_and_computes_the_same(case, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    save_huggingface(tmp_path / "base", tiny.decoder(), bos_id=1, eos_id=2)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    names = [name for name, module in reference.named_modules() if isinstance(module, torch.nn.Linear)]
    trained = peft.get_peft_model(reference, peft.LoraConfig(r=2, lora_alpha=4, **case))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        theirs = trained(torch.asarray(np.array(TOKENS))).logits.numpy()
    trained.save_pretrained(tmp_path / "trained")
    config = json.loads((tmp_path / "trained" / CONFIG).read_text())
    adapted_there = {key.split(".lora_")[0] for key in load_file(tmp_path / "trained" / WEIGHTS) if ".lora_" in key}
    assert {f"base_model.model.{name}" for name in names if is_adapted(config, name)} == adapted_there
    again = load_model(str(tmp_path / "base"))
    assert inject_peft(tmp_path / "trained", again, "base", huggingface_module) == len(adapted_there)
    np.testing.assert_allclose(tiny.call(again, TOKENS), theirs, atol=1e-4)
    # And back: what we write of it, PEFT loads.
    save_peft(tmp_path / "back", again, "base", huggingface_module)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    back = peft.PeftModel.from_pretrained(reference, tmp_path / "back")
    with torch.no_grad():
        np.testing.assert_allclose(back(torch.asarray(np.array(TOKENS))).logits.numpy(), theirs, atol=1e-4)


def test_the_command_trains_them_and_refuses_a_text_that_names_none(model_dir, data_file, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["train", "--model", model_dir, "--data", data_file, "--rank", 2, "--steps", 3, "--batch-size", 4]
    flags += ["--run-dir", run, "--layers-to-transform"]
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, flags), "1-"])
    assert "is not understood at '1-'" in " ".join(capsys.readouterr().err.split())  # which is broken into lines
    assert main([*map(str, flags), "1"]) == 0
    layers = load_file(run / "adapter.safetensors")["layers.self_attn.q_proj.lora_b"]
    assert layers[1].any()
    assert not np.delete(layers, 1, axis=0).any()
