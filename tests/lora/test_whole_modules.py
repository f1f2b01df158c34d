"""Modules that are trained whole: through files, PEFT both ways, merging and a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stable_lora_jax.cli import main
from stable_lora_jax.lora import (
    inject_lora,
    inject_peft,
    load_adapter,
    merge_lora,
    read_adapter_spec,
    save_adapter,
    save_peft,
)
from stable_lora_jax.lora.whole_modules import WholeParam, whole_modules, whole_params
from stable_lora_jax.models import huggingface_module, load_model, save_huggingface
from stable_lora_jax.training import read_metrics
from tests.models import tiny

BASE = "owner/Tiny-Model"
NAMES = ("norm", "input_layernorm", "lm_head")
TOKENS = jnp.arange(12).reshape(2, 6)


def adapted(names=NAMES, seed=1, **config):
    """A tiny model with random adapters, and random changes to what is trained whole."""
    model = tiny.decoder(**config)
    inject_lora(model, 2, 6, "qv", rngs=nnx.Rngs(seed), b_init=nnx.initializers.normal(0.3), modules_to_save=names)
    for number, param in enumerate(whole_params(model).values()):
        param[...] += 0.2 * jax.random.normal(jax.random.key(number), param.shape)
    return model


def test_only_what_is_named_is_trained_and_it_starts_as_it_was():
    model = tiny.decoder()
    inject_lora(model, 2, 6, "qv", rngs=nnx.Rngs(1), modules_to_save=["norm", "self_attn.o_proj"])
    assert whole_modules(model) == ["layers.self_attn.o_proj", "norm"]
    np.testing.assert_array_equal(tiny.call(model, TOKENS), tiny.call(tiny.decoder(), TOKENS))
    trained = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    assert {path[-1] for path, _ in trained} == {"lora_a", "lora_b", "scale", "kernel"}


@pytest.mark.parametrize(
    ("names", "config", "message"),
    [
        (["nothing"], {}, "no module with parameters is called 'nothing'"),
        (["q_proj"], {}, "q_proj are targets and modules_to_save"),
        (["embed_tokens"], {"tie_embeddings": True}, "is the output layer too"),
    ],
)
def test_what_cannot_be_is_refused(names, config, message):
    model = tiny.decoder(**config)
    with pytest.raises(ValueError, match=message):
        inject_lora(model, 2, 6, "qv", rngs=nnx.Rngs(1), modules_to_save=names)
    assert not nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))


def test_files_keep_them_and_merging_folds_them_in(tmp_path):
    model = adapted()
    expected = tiny.call(model, TOKENS)
    save_adapter(tmp_path / "x.safetensors", model, BASE)
    assert read_adapter_spec(tmp_path / "x.safetensors").whole == tuple(whole_modules(model))
    loaded = inject_lora(tiny.decoder(), 2, 6, "qv", rngs=nnx.Rngs(5), modules_to_save=NAMES)
    load_adapter(tmp_path / "x.safetensors", loaded, BASE)
    np.testing.assert_array_equal(tiny.call(loaded, TOKENS), expected)
    save_peft(tmp_path / "peft", model, BASE, huggingface_module)
    imported = tiny.decoder()
    assert inject_peft(tmp_path / "peft", imported, BASE, huggingface_module) == 2 * model.config.num_layers
    np.testing.assert_array_equal(tiny.call(imported, TOKENS), expected)
    with pytest.raises(ValueError, match="whole: file"):
        load_adapter(tmp_path / "x.safetensors", inject_lora(tiny.decoder(), 2, 6, "qv", rngs=nnx.Rngs(5)), BASE)
    merged = merge_lora(model)
    assert not nnx.to_flat_state(nnx.state(merged, WholeParam))
    np.testing.assert_allclose(tiny.call(merged, TOKENS), expected, rtol=1e-4, atol=1e-5)
    save_huggingface(tmp_path / "whole", merged)
    np.testing.assert_allclose(tiny.call(load_model(str(tmp_path / "whole")), TOKENS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers so
def test_peft_computes_the_same_both_ways(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    save_huggingface(tmp_path / "base", tiny.decoder(), bos_id=1, eos_id=2)

    def reference():
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)

    def logits(module):
        with torch.no_grad():
            return module(torch.asarray(np.array(TOKENS))).logits.numpy()

    model = adapted()
    save_peft(tmp_path / "peft", model, BASE, huggingface_module)
    theirs = peft.PeftModel.from_pretrained(reference(), tmp_path / "peft")
    np.testing.assert_allclose(logits(theirs), tiny.call(model, TOKENS), atol=1e-4)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["model.norm", "input_layernorm", "lm_head"],
    )
    trained = peft.get_peft_model(reference(), config)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                parameter.add_(0.05 * noise)
    trained.save_pretrained(tmp_path / "trained")
    again = tiny.decoder()
    inject_peft(tmp_path / "trained", again, "base", huggingface_module)
    assert whole_modules(again) == ["layers.input_layernorm", "lm_head", "norm"]
    np.testing.assert_allclose(tiny.call(again, TOKENS), logits(trained), atol=1e-4)


def test_the_command_trains_them(model_dir, data_file, tmp_path, capsys):
    flags = [
        "train",
        "--model",
        model_dir,
        "--data",
        data_file,
        "--rank",
        2,
        "--modules-to-save",
        "norm,input_layernorm",
    ]
    flags += [
        "--learning-rate",
        "1e-2",
        "--steps",
        6,
        "--batch-size",
        4,
        "--method",
        "lora-rite",
        "--run-dir",
        tmp_path / "run",
    ]
    assert main(list(map(str, flags))) == 0
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    model = load_model(str(model_dir))
    spec = read_adapter_spec(tmp_path / "run" / "adapter.safetensors")
    inject_lora(model, 2, spec.alpha, spec.targets, rngs=nnx.Rngs(0), modules_to_save=spec.whole)
    before = {path: np.array(param[...]) for path, param in whole_params(model).items()}
    load_adapter(tmp_path / "run" / "adapter.safetensors", model, str(model_dir))
    assert list(before) == ["layers.input_layernorm.scale", "norm.scale"]
    for path, param in whole_params(model).items():
        assert (param[...] != before[path]).any(), path
    capsys.readouterr()
    assert main(["generate", "--model", str(model_dir), "--adapter", str(tmp_path / "run"), "--prompt", "1+1?"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "a.gguf"), "--format", "gguf"]) == 2
    assert "hold no whole modules" in capsys.readouterr().err
