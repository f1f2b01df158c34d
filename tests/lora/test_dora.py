"""DoRA against its formula, against PEFT both ways, and through files, optimizers and a resumed run."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from stable_lora_jax import lora_rite, riemannian_adamw, stable_lora
from stable_lora_jax.cli import main
from stable_lora_jax.lora import (
    LoRALinear,
    inject_lora,
    inject_peft,
    load_adapter,
    lora_modules,
    merge_lora,
    quantize_linears,
    read_adapter_spec,
    save_adapter,
    save_peft,
)
from stable_lora_jax.models import huggingface_module, save_huggingface
from stable_lora_jax.training import read_metrics, split_model
from tests.models import tiny

BASE = "owner/Tiny-Model"
NORMAL = nnx.initializers.normal(0.3)


def layer(**options):
    rngs = nnx.Rngs(0)
    base = nnx.Linear(6, 4, rngs=rngs)
    base.bias[...] = jnp.asarray([1.0, -2.0, 0.5, 3.0])
    return LoRALinear(base, 2, 3.0, rngs=rngs, use_dora=True, **options)


def adapted(seed=1, **options):
    """A tiny model with random adapters and magnitudes."""
    model = tiny.decoder()
    inject_lora(model, 2, 6, "qkvogud", rngs=nnx.Rngs(seed), b_init=NORMAL, use_dora=True, **options)
    for number, module in enumerate(lora_modules(model).values()):
        noise = jax.random.uniform(jax.random.key(number), module.magnitude.shape, minval=0.7, maxval=1.3)
        module.magnitude[...] = module.magnitude[...] * noise
    return model


def test_a_fresh_one_changes_nothing():
    fresh = layer()
    x = jax.random.normal(jax.random.key(1), (5, 6))
    np.testing.assert_array_equal(fresh(x), fresh.base(x))
    model, base = tiny.decoder(), tiny.decoder()
    inject_lora(model, 3, 6, "qkvogud", rngs=nnx.Rngs(1), use_dora=True)
    tokens = jnp.arange(12).reshape(2, 6)
    np.testing.assert_allclose(tiny.call(model, tokens), tiny.call(base, tokens), atol=1e-6)


def test_outputs_and_gradients_are_those_of_the_formula():
    module, x = layer(b_init=NORMAL), jax.random.normal(jax.random.key(1), (5, 6))
    module.magnitude[...] = jnp.asarray([1.0, 2.0, 0.5, 1.5])
    graph, state, rest = nnx.split(module, nnx.LoRAParam, ...)
    w, bias = np.float64(module.base.kernel[...]), np.float64(module.base.bias[...])

    def loss(state):
        return jnp.sum(jnp.square(nnx.merge(graph, state, rest)(x)))

    a, b, m = (np.float64(each[...]) for each in (module.lora_a, module.lora_b, module.magnitude))
    sum_, x64 = w + 1.5 * a @ b, np.float64(x)
    norm = np.linalg.norm(sum_, axis=0)
    y = x64 @ sum_ * m / norm + bias
    np.testing.assert_allclose(module(x), y, rtol=1e-5, atol=1e-5)
    grads = jax.grad(loss)(state)
    by_sum = x64.T @ (2 * y * m / norm)  # the norm is a constant
    np.testing.assert_allclose(grads["lora_a"][...], 1.5 * by_sum @ b.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads["lora_b"][...], 1.5 * a.T @ by_sum, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads["magnitude"][...], (2 * y * (x64 @ sum_) / norm).sum(0), rtol=1e-4, atol=1e-4)


def test_merged_it_is_one_linear():
    model, tokens = adapted(), jnp.arange(12).reshape(2, 6)
    expected = tiny.call(model, tokens)
    np.testing.assert_allclose(tiny.call(merge_lora(model), tokens), expected, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_model_keeps_its_dtype():
    base = nnx.Linear(64, 32, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    module = LoRALinear(base, 4, 8.0, rngs=nnx.Rngs(1), b_init=NORMAL, use_dora=True)
    assert module.magnitude.dtype == jnp.float32
    assert module(jnp.ones((2, 64), jnp.bfloat16)).dtype == jnp.bfloat16


def test_files_keep_it(tmp_path):
    model = adapted()
    save_adapter(tmp_path / "x.safetensors", model, BASE)
    assert read_adapter_spec(tmp_path / "x.safetensors").use_dora
    save_peft(tmp_path / "peft", model, BASE, huggingface_module)
    loaded = inject_lora(tiny.decoder(), 2, 6, "qkvogud", rngs=nnx.Rngs(5), use_dora=True)
    load_adapter(tmp_path / "x.safetensors", loaded, BASE)
    imported = tiny.decoder()
    assert inject_peft(tmp_path / "peft", imported, BASE, huggingface_module) == 7 * model.config.num_layers
    for path, module in lora_modules(model).items():
        for other in (loaded, imported):
            for side in ("lora_a", "lora_b", "magnitude"):
                np.testing.assert_array_equal(getattr(lora_modules(other)[path], side)[...], getattr(module, side)[...])
    plain = inject_lora(tiny.decoder(), 2, 6, "qkvogud", rngs=nnx.Rngs(5))
    with pytest.raises(ValueError, match="use_dora: file True, model False"):
        load_adapter(tmp_path / "x.safetensors", plain, BASE)


def test_a_quantized_base_is_refused():
    model = quantize_linears(tiny.decoder(), "int8")
    with pytest.raises(ValueError, match="the base is quantized"):
        inject_lora(model, 2, 4, "qv", rngs=nnx.Rngs(0), use_dora=True)
    assert not lora_modules(model)


@pytest.mark.parametrize(
    "make",
    [lambda rate: stable_lora(optax.adamw(rate, weight_decay=0), 0.01), riemannian_adamw, lora_rite],
    ids=["stable_lora", "riemannian", "lora_rite"],
)
def test_optimizers_move_magnitudes_as_adamw_does(make):
    """They are no A and no B; the shrink leaves them alone."""
    _, params, _ = split_model(adapted())
    grads = jax.tree.map(lambda p: 0.01 * p, params)
    both = make(1e-2), optax.adamw(1e-2, weight_decay=0)
    moved, expected = (tx.update(grads, tx.init(params), params)[0] for tx in both)

    def magnitudes(tree):
        return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if "magnitude" in str(path[-1])]

    assert len(magnitudes(moved)) == 7
    for ours, theirs in zip(magnitudes(moved), magnitudes(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers so
def test_peft_computes_the_same_both_ways(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = adapted()
    save_huggingface(tmp_path / "base", tiny.decoder(), bos_id=1, eos_id=2)
    save_peft(tmp_path / "peft", model, BASE, huggingface_module)
    tokens = np.arange(12).reshape(2, 6)

    def reference():
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)

    def logits(module):
        with torch.no_grad():
            return module(torch.asarray(tokens)).logits.numpy()

    theirs = peft.PeftModel.from_pretrained(reference(), tmp_path / "peft")
    np.testing.assert_allclose(logits(theirs), tiny.call(model, jnp.asarray(tokens)), atol=1e-4)
    # One that PEFT starts, moves and writes.
    config = peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["q_proj", "down_proj"])
    trained = peft.get_peft_model(reference(), config)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                parameter.mul_(1.1).add_(0.05 * noise)
    trained.save_pretrained(tmp_path / "trained")
    again = tiny.decoder()
    inject_peft(tmp_path / "trained", again, "base", huggingface_module)
    np.testing.assert_allclose(tiny.call(again, jnp.asarray(tokens)), logits(trained), atol=1e-4)


def test_the_command_trains_resumes_and_exports_it(model_dir, data_file, tmp_path, capsys):
    flags = ["train", "--model", model_dir, "--data", data_file, "--rank", 2, "--use-dora", "--batch-size", 4]
    flags += ["--save-every", 3, "--keep", 3, "--norms-every", 3, "--learning-rate", "1e-2"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main([*map(str, flags), "--steps", "6", "--run-dir", str(whole)]) == 0
    losses = [line["loss"] for line in read_metrics(whole / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    assert main([*map(str, flags), "--steps", "6", "--run-dir", str(run)]) == 0
    (run / "adapter.safetensors").unlink()
    shutil.rmtree(run / "checkpoints" / "6")
    # As of a run that is older than an option: it resumes with the default, and with nothing else.
    record = json.loads((run / "config.json").read_text())
    del record["config"]["adapter"]["modules_to_save"]
    (run / "config.json").write_text(json.dumps(record))
    resumed = [*map(str, flags), "--steps", "6", "--run-dir", str(run), "--resume"]
    assert main([*resumed, "--modules-to-save", "norm"]) == 2
    assert "adapter.modules_to_save: run '', now 'norm'" in capsys.readouterr().err
    assert main(resumed) == 0
    assert (run / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    assert main(["export", str(run), str(tmp_path / "peft")]) == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["use_dora"] is True
    assert main(["export", str(run), str(tmp_path / "merged"), "--format", "merged"]) == 0
