"""GGUF files made here with the gguf package's writer."""

import gguf
import numpy as np
import pytest

from stable_lora_jax.models import Llama3RopeScaling, load_model
from stable_lora_jax.models.rotary import rotary_frequencies
from tests.models import tiny

# Quantised blocks span 32 or 256 features, so these widths are multiples of 256.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_layers": 1, "num_heads": 4, "head_dim": 64}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave(rows, num_heads):
    """The row order llama.cpp's converter gives to query and key projections of a llama file."""
    heads = rows.reshape(num_heads, 2, -1, rows.shape[-1])
    return np.stack([heads[:, 0], heads[:, 1]], axis=2).reshape(rows.shape)


def gguf_name(name):
    module, leaf = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        return f"blk.{layer}.{NAMES[module]}.{leaf}"
    return f"{NAMES[module]}.{leaf}"


def write(path, model, kind="F32", architecture=None, fields=(), extra=(), raw=()):
    config = model.config
    architecture = architecture or ("qwen2" if config.qkv_bias else "llama")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, value in dict(fields).items():
        writer.add_string(f"{architecture}.{name}", value)
    for name, value in tiny.hf_tensors(model).items():
        if architecture == "llama" and "q_proj" in name:
            value = interleave(value, config.num_heads)
        if architecture == "llama" and "k_proj" in name:
            value = interleave(value, config.num_kv_heads)
        one_kind = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        stored, one_kind = dict(raw).get(name) or (gguf.quantize(value, one_kind), one_kind)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=one_kind)
    for name, value in dict(extra).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"qkv_bias": True}], ids=str)
def test_llama_and_qwen2_come_back_bit_for_bit(tmp_path, changes):
    model = tiny.decoder(**changes)
    loaded = load_model(write(tmp_path / "model.gguf", model))
    assert loaded.config == tiny.config(rms_norm_eps=float(np.float32(1e-5)), **changes)
    np.testing.assert_array_equal(tiny.call(loaded, tiny.tokens()), tiny.call(model, tiny.tokens()))


@pytest.mark.parametrize("kind", TYPES)
def test_types_are_dequantised(tmp_path, kind):
    model = tiny.decoder(**WIDE)
    loaded = load_model(write(tmp_path / "model.gguf", model, kind))
    got, expected = (np.asarray(one.layers.mlp.up_proj.kernel[...]) for one in (loaded, model))
    # The coarsest kind has 16 levels between the largest weights of a block, about 5 standard deviations apart.
    assert np.abs(got - expected).max() <= {"F32": 0, "F16": 1e-3, "BF16": 3e-3}.get(kind, expected.std() / 2)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_super_blocks_are_dequantised(tmp_path, kind):
    # The gguf package cannot write these; bytes below 60 keep the float16 scales among them finite.
    one_kind = gguf.GGMLQuantizationType[kind]
    raw = np.random.default_rng(0).integers(0, 60, (256, gguf.GGML_QUANT_SIZES[one_kind][1]), dtype=np.uint8)
    path = write(
        tmp_path / "model.gguf", tiny.decoder(**WIDE), raw={"model.layers.0.mlp.up_proj.weight": (raw, one_kind)}
    )
    np.testing.assert_array_equal(load_model(path).layers.mlp.up_proj.kernel[0], gguf.dequantize(raw, one_kind).T)


def test_llama3_scaling_is_recovered(tmp_path):
    scaling = Llama3RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
    factors = rotary_frequencies(64, 1e4, None) / rotary_frequencies(64, 1e4, scaling)
    loaded = load_model(write(tmp_path / "model.gguf", tiny.decoder(**WIDE), extra={"rope_freqs.weight": factors}))
    assert loaded.config.rope_scaling == scaling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gemma"}, r"general.architecture='gemma'; supported are llama, qwen2"),
        ({"fields": {"rope.scaling.type": "yarn"}}, r"llama.rope.scaling.type='yarn' is not supported"),
        (
            {"extra": {"rope_freqs.weight": np.array([1.0, 9.0], np.float32)}},
            r"rope_freqs.weight holds factors up to 9",
        ),
        ({"extra": {"rope_long.weight": np.ones(2, np.float32)}}, r"1 unexpected tensors: rope_long.weight"),
        ({"extra": {"whole.weight": np.ones(2, np.int8)}}, r"whole.weight has type I8; allowed are F32, F16"),
    ],
    ids=["architecture", "scaling", "factors", "tensor", "type"],
)
def test_unsupported_is_refused_by_name(tmp_path, options, message):
    path = write(tmp_path / "model.gguf", tiny.decoder(), **options)
    with pytest.raises(ValueError, match=message):
        load_model(path)


@pytest.mark.parametrize("keep", [0, 2, 30, 1000, -1000])
def test_truncated_file(tmp_path, keep):
    path = write(tmp_path / "model.gguf", tiny.decoder())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=r"model.gguf (begins with|has a damaged or cut header|is not a whole GGUF file).*again"
    ):
        load_model(path)


def test_another_file_is_no_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1" * 9)
    with pytest.raises(ValueError, match=r"begins with b'vers'.*only GGUF files of version 2 and 3"):
        load_model(path)
