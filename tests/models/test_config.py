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
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel.*llama \(LlamaForCausalLM\), qwen2 \(Qwen2For"),
        ({"architectures": None}, r"model_type=None, architectures=None"),
        *(
            (
                {"model_type": each, "architectures": ["LlamaForCausalLM"]},
                rf"model_type='{each}', architectures=\['Llama",
            )
            for each in ("gemma", "mixtral", "qwen3_moe", "gemma3")
        ),
        ({"is_causal": False}, r"is_causal=False is not supported; allowed is True"),
        (
            {"quantization_config": {"quant_method": "bitnet"}},
            r"quantization_config=.*bitnet.*allowed is to leave it out",
        ),
        ({"auto_map": {"AutoModel": "code.Mine"}}, r"auto_map=.*allowed is code for 'LlamaForCausalLM'"),
        ({"attention_dropout": "0.1"}, r"attention_dropout='0.1' is no number"),
        (
            {"query_pre_attn_scalar": 256},
            r"the key query_pre_attn_scalar \(here 256\) is not known; it may change what",
        ),
        ({"rope_theta": None}, r"rope_theta is null; it must be a positive number; remove the key for the default"),
        ({"rope_theta": "10000"}, r"rope_theta='10000' is no number; write it as one, without quotes"),
        ({"rms_norm_eps": "1e-5"}, r"rms_norm_eps='1e-5' is no number; write it as one, without quotes"),
        ({"hidden_size": "24"}, r"hidden_size='24' is no number"),
        ({"hidden_size": 24.5}, r"hidden_size=24.5 is no whole number"),
        ({"vocab_size": True}, r"vocab_size=True is no number"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings='false' is neither true nor false"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_parameters": {"rope_type": "default"}},
            r"rope_scaling says rope_type='llama3', another place says 'default'; they must agree",
        ),
        ({"rope_parameters": {"rope_theta": 5e5}}, r"rope_parameters says rope_theta=500000.0, another place says 1"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "original_max_position_embeddings": 16},
            r"rope_scaling says original_max_position_embeddings=32, another place says 16",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "beta_fast": 32}},
            r"the key beta_fast \(here 32\) of rope_scal",
        ),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\] is no object"),
        ({"rope_scaling": {"rope_type": "proportional"}}, r"rope_type='proportional' is not supported; allowed is 'd"),
        ({"rope_scaling": {"rope_type": "longrope"}}, r"short_factor=None; it must be a list of numbers"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"key 'factor' is missing"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0.5"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'.*'silu'"),
        ({"mlp_bias": "yes"}, r"mlp_bias='yes' is neither true nor false"),
        ({"model_type": "qwen2", "attention_bias": True}, r"attention_bias=True"),
        ({"model_type": "olmo2", "mlp_bias": True}, r"mlp_bias=True"),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3},
            r"names sliding layers, use_sliding",
        ),
        ({"model_type": "ministral", "layer_types": ["full_attention"] * 2}, r"must be a list of 3, each"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2, 0]}, r"must be a list of 3, each 0 or 1"),
        ({"model_type": "smollm3", "use_sliding_window": True}, r"use_sliding_window=True"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50.0"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}},
            r"must hold full_attention and",
        ),
        ({"model_type": "granite", "attention_multiplier": "x"}, r"attention_multiplier='x' is no number"),
        ({"use_sliding_window": True}, r"use_sliding_window=True"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, r"layer_types=\['sliding_attention', 'full_"),
        ({"num_key_value_heads": 4}, r"num_heads=6, num_kv_heads=4.*divides"),
        ({"head_dim": 3}, r"head_dim=3.*even"),
        ({"hidden_size": 0}, r"hidden_size=0; it must be positive"),
        ({"rope_scaling": {"rope_type": "llama3"}}, r"key 'factor' is missing"),
    ],
)
def test_unsupported_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**tiny.hf_config(tiny.CONFIG), **changes})


def test_transformers_goes_by_model_type():
    raw = tiny.hf_config(tiny.CONFIG)
    assert config_from_hf({**raw, "model_type": "llama", "architectures": ["Qwen2ForCausalLM"]}) == tiny.CONFIG
    assert config_from_hf({**raw, "model_type": "qwen2", "architectures": None}) == tiny.config(qkv_bias=True)


def test_a_missing_key_is_named():
    raw = tiny.hf_config(tiny.CONFIG)
    del raw["vocab_size"]
    with pytest.raises(ValueError, match="key 'vocab_size' is missing"):
        config_from_hf(raw)


def test_llama3_bands_must_be_ordered():
    with pytest.raises(ValueError, match=r"low_freq_factor=4.0.*low must be below high"):
        Llama3RopeScaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0, original_max_positions=32)
