import pytest

from stable_lora_jax.models import Llama3RopeScaling, config_from_hf
from tests.models import tiny

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SCALING = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32)


def test_reads_back_what_was_written():
    assert config_from_hf(tiny.hf_config(tiny.CONFIG)) == tiny.CONFIG


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
    ],
    ids=["old", "older", "transformers 5"],
)
def test_rotary_settings_old_and_new(rope):
    raw = tiny.hf_config(tiny.CONFIG)
    del raw["rope_theta"]
    assert config_from_hf({**raw, **rope}) == tiny.config(rope_theta=5e5, rope_scaling=SCALING)


def test_absent_settings_take_the_architecture_defaults():
    raw = tiny.hf_config(tiny.CONFIG)
    for name in ("rope_theta", "num_key_value_heads", "head_dim", "tie_word_embeddings"):
        del raw[name]
    assert config_from_hf(raw) == tiny.config(num_kv_heads=6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel.*LlamaForCausalLM, Qwen2ForCausalLM"),
        ({"architectures": None}, r"architectures=\[\]"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_type='yarn' is not supported; allowed is 'default' or"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0.5"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'.*'silu'"),
        ({"mlp_bias": True}, r"mlp_bias=True"),
        ({"attention_bias": True}, r"attention_bias=True"),
        ({"use_sliding_window": True}, r"use_sliding_window=True"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, r"layer_types=\['full_attention', 'sliding_"),
        ({"num_key_value_heads": 4}, r"num_heads=6, num_kv_heads=4.*divides"),
        ({"head_dim": 3}, r"head_dim=3.*even"),
        ({"hidden_size": 0}, r"hidden_size=0; it must be positive"),
        ({"rope_scaling": {"rope_type": "llama3"}}, r"key 'factor' is missing"),
    ],
)
def test_unsupported_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**tiny.hf_config(tiny.CONFIG), **changes})


def test_a_missing_key_is_named():
    raw = tiny.hf_config(tiny.CONFIG)
    del raw["vocab_size"]
    with pytest.raises(ValueError, match="key 'vocab_size' is missing"):
        config_from_hf(raw)


def test_llama3_bands_must_be_ordered():
    with pytest.raises(ValueError, match=r"low_freq_factor=4.0.*low must be below high"):
        Llama3RopeScaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0, original_max_positions=32)
