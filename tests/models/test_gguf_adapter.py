"""Adapters as GGUF: base tensor + alpha / r · B A is the tensor of the merged model, in llama.cpp's own row order."""

import gguf
import numpy as np
import pytest
from flax import nnx

from stable_lora_jax.cli import main
from stable_lora_jax.lora import inject_lora, lora_modules, merge_lora, save_adapter
from stable_lora_jax.models import save_gguf_adapter
from tests.models import tiny
from tests.models.test_gguf import write

NORMAL = nnx.initializers.normal(0.3)


def adapted(config=None, **options):
    model = tiny.decoder(**(config or {}))
    arguments = {"rank": 2, "alpha": 6, "targets": "qkvogud"} | options
    return inject_lora(model, rngs=nnx.Rngs(1), b_init=NORMAL, **arguments)


def tensors(file):
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 4, "q_proj": 3}, "alpha_pattern": {"v_proj": 5.0}}],
    ids=["plain", "rslora", "patterns"],
)
@pytest.mark.parametrize(
    "config", [{"model_type": "llama"}, {"model_type": "qwen2", "qkv_bias": True}], ids=["llama", "qwen2"]
)
def test_base_and_adapter_are_the_merged_model(config, options, tmp_path):
    model = adapted(config, **options)
    count = save_gguf_adapter(tmp_path / "adapter.gguf", model)
    write(tmp_path / "base.gguf", tiny.decoder(**config))
    write(tmp_path / "merged.gguf", merge_lora(model))
    fields = gguf.GGUFReader(tmp_path / "adapter.gguf").fields
    said = {name: field.contents() for name, field in fields.items()}
    assert (said["general.type"], said["adapter.type"]) == ("adapter", "lora")
    assert said["general.architecture"] == config["model_type"]
    base, merged, adapter = (tensors(tmp_path / f"{name}.gguf") for name in ("base", "merged", "adapter"))
    assert count == len(adapter) // 2 == 7 * model.config.num_layers
    for name, tensor in base.items():
        if f"{name}.lora_a" in adapter:
            a, b = adapter.pop(f"{name}.lora_a"), adapter.pop(f"{name}.lora_b")
            assert np.abs(merged[name] - tensor).max() > 0.1
            tensor = tensor + said["adapter.lora.alpha"] / a.shape[0] * b @ a
        np.testing.assert_allclose(merged[name], tensor, rtol=1e-5, atol=1e-5, err_msg=name)
    assert not adapter


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"model_type": "phi3"}, {}, "Adapters of model_type='phi3' are not written as GGUF"),
        ({"model_type": "llama"}, {"use_dora": True}, "llama.cpp knows no magnitudes"),
    ],
)
def test_what_has_no_counterpart_is_refused(config, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_gguf_adapter(tmp_path / "adapter.gguf", adapted(config, **options))
    assert not list(tmp_path.iterdir())


def test_the_command_line_writes_one_and_nothing_over_it(model_dir, tmp_path, capsys):
    from stable_lora_jax.models import load_model

    model = inject_lora(load_model(str(model_dir)), 2, 6, "qv", rngs=nnx.Rngs(1), b_init=NORMAL)
    save_adapter(tmp_path / "adapter.safetensors", model, str(model_dir))
    arguments = ["export", str(tmp_path / "adapter.safetensors"), str(tmp_path / "adapter.gguf"), "--format", "gguf"]
    assert main(arguments) == 0
    layers = model.config.num_layers
    assert len(tensors(tmp_path / "adapter.gguf")) == 2 * 2 * layers
    assert len(lora_modules(model)) == 2
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
