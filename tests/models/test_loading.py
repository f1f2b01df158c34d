import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from transformers import AutoConfig

from stable_lora_jax.lora import inject_lora, quantize_linears
from stable_lora_jax.models import load_model, save_huggingface
from tests.models import tiny


@pytest.fixture
def saved(tmp_path):
    model = tiny.decoder()
    return tiny.save(tmp_path, model.config, tiny.hf_tensors(model))


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"qkv_bias": True}], ids=str)
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, changes):
    model = tiny.decoder(**changes)
    loaded = load_model(tiny.save(tmp_path, model.config, tiny.hf_tensors(model)))
    assert loaded.config == model.config
    np.testing.assert_array_equal(tiny.call(loaded, tiny.tokens()), tiny.call(model, tiny.tokens()))


def test_shards_are_joined(saved):
    tensors = tiny.hf_tensors(tiny.decoder())
    names = sorted(tensors)
    shards = {"model-1-of-2.safetensors": names[:9], "model-2-of-2.safetensors": names[9:]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, saved / shard)
    (saved / "model.safetensors").unlink()
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(tiny.call(load_model(saved), tiny.tokens()), tiny.call(tiny.decoder(), tiny.tokens()))
    (saved / "model-2-of-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-2-of-2.safetensors"):
        load_model(saved)


def test_a_stale_index_beside_a_single_file_is_passed_over(saved):
    (saved / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lm_head.weight": "model-1-of-2.safetensors"}}'
    )
    np.testing.assert_array_equal(tiny.call(load_model(saved), tiny.tokens()), tiny.call(tiny.decoder(), tiny.tokens()))
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-1-of-2.safetensors"):
        load_model(saved)
    (saved / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}'
    )
    with pytest.raises(ValueError, match=r"names \['../elsewhere.safetensors'\]; only files next to it are read"):
        load_model(saved)


def test_an_index_without_a_map_is_refused(saved):
    (saved / "model.safetensors.index.json").write_text("{}")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json has no weight_map.*again"):
        load_model(saved)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"qkv_bias": True}], ids=str)
def test_what_is_saved_here_comes_back_and_names_its_tokens(tmp_path, changes):
    model = tiny.decoder(**changes)
    save_huggingface(str(tmp_path / "a"), model)
    save_huggingface(tmp_path / "b", model, bos_id=3, eos_id=4)
    np.testing.assert_array_equal(tiny.call(load_model(tmp_path / "a"), tiny.tokens()), tiny.call(model, tiny.tokens()))
    configs = [AutoConfig.from_pretrained(tmp_path / name) for name in "ab"]
    assert [(config.bos_token_id, config.eos_token_id) for config in configs] == [(None, None), (3, 4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: quantize_linears(model, "int8"), r"holds layers\.mlp\.down_proj\.kernel.* without quantizing"),
        (
            lambda model: inject_lora(model, 2, 4.0, ["v_proj"], rngs=nnx.Rngs(0)),
            r"holds layers\.self_attn\.v_proj\.lora_a, layers\.self_attn\.v_proj\.lora_b; .*merge_lora\(model\)",
        ),
    ],
)
def test_what_is_no_plain_model_is_not_saved(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        save_huggingface(tmp_path / "out", change(tiny.decoder()))
    assert not (tmp_path / "out").exists()


def test_bfloat16_files_and_bfloat16_parameters(saved):
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in tiny.hf_tensors(tiny.decoder()).items()}
    save_file(tensors, saved / "model.safetensors")
    model = load_model(saved, param_dtype=jnp.bfloat16)
    kernel = model.layers.mlp.down_proj.kernel[...]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel[1], tensors["model.layers.1.mlp.down_proj.weight"].T)
    assert load_model(saved).layers.mlp.down_proj.kernel.dtype == jnp.float32


def test_options_reach_the_decoder(saved):
    model = load_model(saved, dtype=jnp.bfloat16, remat=True)
    assert model.remat
    assert model.dtype == jnp.bfloat16


def test_known_harmless_tensors_are_ignored(tmp_path):
    model = tiny.decoder(tie_embeddings=True)
    tensors = tiny.hf_tensors(model)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
        "lm_head.weight": tensors["model.embed_tokens.weight"],
    }
    loaded = load_model(tiny.save(tmp_path, model.config, tensors | extra))
    assert loaded.config.tie_embeddings
    np.testing.assert_array_equal(tiny.call(loaded, tiny.tokens()), tiny.call(model, tiny.tokens()))


def test_missing_tensors_are_listed(saved):
    tensors = tiny.hf_tensors(tiny.decoder())
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 2 tensors: lm_head.weight, model.layers.1.mlp.up_proj.weight;"):
        load_model(saved)


def test_unexpected_tensors_are_listed(saved):
    save_file(tiny.hf_tensors(tiny.decoder(qkv_bias=True, num_layers=1)), saved / "model.safetensors")
    config = tiny.hf_config(tiny.config(num_layers=1))
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"3 unexpected tensors: model.layers.0.self_attn.k_proj.bias, "):
        load_model(saved)


def test_wrong_shape_is_named(saved):
    tensors = tiny.hf_tensors(tiny.decoder())
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((40, 23), np.float32)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers.2.mlp.up_proj.weight has shape \(40, 23\).*asks for \(40, 24\)"):
        load_model(saved)


def test_unsupported_type_is_named(saved):
    tensors = tiny.hf_tensors(tiny.decoder())
    tensors["model.norm.weight"] = np.ones(24, np.int8)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight has type I8; allowed are F64, F32, F16, BF16"):
        load_model(saved)


def test_unsupported_architecture(saved):
    (saved / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ValueError, match=r"MambaForCausalLM.*LlamaForCausalLM.*Qwen2ForCausalLM"):
        load_model(saved)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(saved, keep):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file: .*again"):
        load_model(saved)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1 " * 9,
        (16).to_bytes(8, "little") + b"not json at all!" * 2,
        (16).to_bytes(8, "little") + b"[1, 2, 3, 4, 5 ]",
        (67).to_bytes(8, "little") + b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}       ' + b"0" * 8,
    ],
    ids=["git-lfs pointer", "no json", "no object", "shape and bytes differ"],
)
def test_not_a_safetensors_file(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a whole safetensors file"):
        load_model(saved)


@pytest.mark.parametrize("content", ["{", "5", "\xff"])
def test_a_damaged_configuration_is_named(saved, content):
    (saved / "config.json").write_text(content, "latin-1")
    with pytest.raises(ValueError, match=r"config.json does not hold a JSON object \(.*again"):
        load_model(saved)


def test_missing_files(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model.safetensors.*converted to safetensors"):
        load_model(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        load_model(saved)


@pytest.mark.parametrize("name", ["smollm3", "/no/such/directory", "no/such/file.gguf", "./a/b/c"])
def test_unknown_names_get_the_list(name):
    with pytest.raises(ValueError, match=r"aliases smollm2-135m, an existing .gguf file.*hub name 'owner/model'"):
        load_model(name)


def test_hub_out_of_reach():
    with pytest.raises(ConnectionError, match=r"'nobody/nothing' is no local path.*check the name and the network"):
        load_model("nobody/nothing")
