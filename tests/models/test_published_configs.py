"""Published config.json files, their fields restated: each is read, and gives the published number of parameters."""

import contextlib
import json

import jax
import numpy as np
import pytest
from flax import nnx

from stable_lora_jax.models import Decoder, LongRopeScaling, config_from_hf
from stable_lora_jax.models.hf_config import config_to_hf
from tests import fuzzing

FULL, SLIDING = "full_attention", "sliding_attention"
SAVED = {"torch_dtype": "bfloat16", "transformers_version": "4.50.0", "use_cache": True, "initializer_range": 0.02}
QWEN3 = SAVED | {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
MISTRAL = SAVED | {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
MINISTRAL = MISTRAL | {
    "attention_dropout": 0.0, "head_dim": 128, "intermediate_size": 12288, "num_hidden_layers": 36,
    "rope_theta": 100000000.0, "sliding_window": 32768, "vocab_size": 131072,
}  # fmt: skip
SMOLLM3 = SAVED | {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": None,
    "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008,
    "layer_types": [FULL] * 36, "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False,
    "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004,
    "pretraining_tp": 2, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
    "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
OLMO2 = SAVED | {
    "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 100257,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "olmo2", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pad_token_id": 100277, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 500000,
    "tie_word_embeddings": False, "vocab_size": 100352,
}  # fmt: skip
GRANITE = SAVED | {
    "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
    "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "granite", "num_attention_heads": 32,
    "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0, "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 5000000.0, "tie_word_embeddings": True,
    "vocab_size": 49155,
}  # fmt: skip
GEMMA3 = SAVED | {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
GEMMA3_SMALL = {key: value for key, value in GEMMA3.items() if key not in ("cache_implementation", "dtype")} | {
    "_sliding_window_pattern": 6, "hidden_size": 640, "intermediate_size": 2048,
    "layer_types": ([SLIDING] * 5 + [FULL]) * 3, "num_hidden_layers": 18, "rope_local_base_freq": 10000.0,
    "use_bidirectional_attention": False,
}  # fmt: skip
PHI3 = SAVED | {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
    "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
    "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0,
    "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064,
}  # fmt: skip
PHI4_MINI = PHI3 | {
    "auto_map": PHI3["auto_map"] | {"AutoTokenizer": "Xenova/gpt-4o"}, "full_attn_mod": 1, "interpolate_factor": 1,
    "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24,
    "num_key_value_heads": 8, "partial_rotary_factor": 0.75,
    "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064,
}  # fmt: skip


@pytest.mark.parametrize(
    ("published", "parameters"),
    [
        pytest.param(QWEN3, 596_049_920, id="Qwen3-0.6B"),
        pytest.param(MISTRAL, 7_241_732_096, id="Mistral-7B-v0.1"),
        pytest.param(MINISTRAL, 8_019_808_256, id="Ministral-8B-Instruct-2410"),
        pytest.param(SMOLLM3, 3_075_098_624, id="SmolLM3-3B"),
        pytest.param(OLMO2, 7_298_617_344, id="OLMo-2-1124-7B"),
        pytest.param(GRANITE, 2_533_531_648, id="granite-3.1-2b-instruct"),
        pytest.param(GEMMA3, 999_885_952, id="gemma-3-1b-it"),
        pytest.param(GEMMA3_SMALL, 268_098_176, id="gemma-3-270m"),
        pytest.param(PHI3, 3_821_079_552, id="Phi-3-mini-4k-instruct"),
        pytest.param(PHI4_MINI, 3_836_021_760, id="Phi-4-mini-instruct"),
    ],
)
@pytest.mark.filterwarnings("ignore:config.json. attention_dropout=0.1:UserWarning")
def test_published_files_are_read(published, parameters):
    config = config_from_hf(published)
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(decoder))) == parameters
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize("written", [False, True], ids=["as published", "as written here"])
@pytest.mark.filterwarnings("ignore:config.json. attention_dropout:UserWarning")
def test_a_damaged_one_is_an_error_with_a_message(written):
    for published in (QWEN3, MISTRAL, MINISTRAL, SMOLLM3, OLMO2, GRANITE, GEMMA3, GEMMA3_SMALL, PHI3, PHI4_MINI):
        whole = json.dumps(config_to_hf(config_from_hf(published)) if written else published).encode()
        for seed in range(150):
            with contextlib.suppress(ValueError):  # also of json
                if isinstance(raw := json.loads(fuzzing.damage_json(np.random.default_rng(seed), whole)), dict):
                    config_to_hf(config_from_hf(raw))


def test_what_they_say_is_what_is_computed():
    gemma = config_from_hf(GEMMA3)
    assert [layer for layer in range(26) if not gemma.slides(layer)] == [5, 11, 17, 23]
    assert (gemma.rope_theta, gemma.sliding_rope_theta, gemma.attention_scale) == (1e6, 1e4, 1 / 16)
    smollm3 = config_from_hf(SMOLLM3)
    assert [layer for layer in range(8) if not smollm3.rotates(layer)] == [3, 7]
    phi4 = config_from_hf(PHI4_MINI)
    assert isinstance(phi4.rope_scaling, LongRopeScaling)
    assert phi4.rotated == 96


def test_dropout_of_attention_is_told():
    with pytest.warns(UserWarning, match=r"attention_dropout=0.1 .*not applied"):
        config_from_hf(GRANITE)


def test_code_of_a_class_of_another_name_is_refused():
    auto_map = {"AutoModelForCausalLM": "modeling_mine.MyForCausalLM"}
    with pytest.raises(ValueError, match=r"auto_map.*MyForCausalLM.*'Phi3ForCausalLM'"):
        config_from_hf(PHI3 | {"auto_map": auto_map})
