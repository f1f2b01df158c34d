"""Against transformers on random models, in PyTorch float32."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from stable_lora_jax.lora import inject_lora, inject_peft, save_peft
from stable_lora_jax.models import (
    LongRopeScaling,
    generate,
    huggingface_module,
    init_cache,
    joined_modules,
    load_model,
    save_huggingface,
)
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Float32 sums in another order, three layers, logits of order ten.
TOLERANCE = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
LONG |= {"short_factor": [1.0, 1.1, 1.2], "long_factor": [1.5, 2.0, 4.0]}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 6, "num_hidden_layers": 4}
GEMMA |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 0.5}


def reference(family, **changes):
    """A random transformers model; weights large enough that attention is far from uniform, biases not zero."""
    torch.manual_seed(0)
    config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")(
        **{
            "vocab_size": 61,
            "hidden_size": 56,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "initializer_range": 0.15,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **changes,
        }
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        if "norm" in name:  # not all 1, or 0
            torch.nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.2)
    return model


@pytest.mark.parametrize(
    ("family", "changes", "shard"),
    [
        ("Llama", {}, None),
        ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}, "20KB"),
        ("Llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, "head_dim": 12}, None),
        ("Llama", {"rope_parameters": LLAMA3}, None),
        ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "20KB"),
        ("Qwen2", {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}, None),
        ("Qwen2", {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}, None),
        ("Llama", {"attention_bias": True, "mlp_bias": True}, None),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}, None),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}}, None),
        ("Llama", {"rope_parameters": YARN}, None),
        ("Qwen2", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}}, None),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, None),
        ("Qwen3", {"head_dim": 8}, None),
        ("Qwen3", {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True}, "20KB"),
        ("Mistral", {"sliding_window": None}, None),
        ("Mistral", {"sliding_window": 7, "head_dim": 12}, None),
        (
            "Ministral",
            {"head_dim": 8, "sliding_window": 7, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
            None,
        ),
        ("SmolLM3", {"no_rope_layer_interval": 2}, None),
        ("SmolLM3", {"no_rope_layers": [0, 1, 1], "attention_bias": True, "tie_word_embeddings": False}, None),
        ("Olmo2", {}, None),
        ("Olmo2", {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}, None),
        ("Granite", GRANITE, None),
        ("Granite", GRANITE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, None),
        ("Gemma3", GEMMA, None),
        ("Gemma3", GEMMA | {"attention_bias": True, "tie_word_embeddings": False}, "20KB"),
        ("Phi3", {}, None),
        ("Phi3", {"sliding_window": 9, "num_key_value_heads": 7, "tie_word_embeddings": True}, "20KB"),
        ("Phi3", {"rope_parameters": LONG | {"partial_rotary_factor": 0.75}}, None),
    ],
)
def test_logits_equal_transformers(tmp_path, family, changes, shard):
    expected_model = reference(family, **changes)
    expected_model.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(shard)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 40))
    with torch.no_grad():
        expected = expected_model(torch.asarray(tokens)).logits.numpy()
    model = load_model(tmp_path)
    logits = tiny.call(model, jnp.asarray(tokens))
    assert expected.std() > 0.5
    assert np.abs(logits - expected).max() <= TOLERANCE
    # A token at a time, from a cache.
    cache, steps = init_cache(model.config, 2, 40), []
    for position in range(40):
        at = jnp.full((2, 1), position)
        hidden, cache = extend(model, tokens[:, position, None], at, cache)
        steps.append(model.logits(hidden))
    if not isinstance(model.config.rope_scaling, LongRopeScaling):  # which depends on how long a row is
        assert np.abs(jnp.concatenate(steps, 1) - expected).max() <= TOLERANCE
    # Written again, transformers has the same model, tied where it was.
    save_huggingface(tmp_path / "again", model)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.asarray(tokens)).logits.numpy(), expected, atol=2e-6, rtol=0)
    tied = changes.get("tie_word_embeddings", family in ("SmolLM3", "Gemma3"))
    assert (again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()) == tied
    with pytest.raises(FileExistsError, match=r"holds config\.json and model\.safetensors already"):
        save_huggingface(tmp_path / "again", model)


def _edit(directory, tensors=None, **changes):
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _swap_names(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    return tensors


@pytest.mark.parametrize(
    ("made", "changes", "tensors"),
    [
        ({}, {"tie_word_embeddings": True}, None),  # beside an lm_head of its own
        ({"tie_word_embeddings": True}, {}, _swap_names),  # of which only the head is stored
        ({}, {"architectures": ["Qwen2ForCausalLM"]}, None),
        ({}, {"architectures": None}, None),
        ({}, {"rope_theta": None}, None),  # beside rope_parameters
    ],
    ids=["tied, another head", "tied, head alone", "other architecture", "no architecture", "theta null"],
)
def test_odd_configurations_are_read_as_transformers_does(tmp_path, made, changes, tensors):
    reference("Llama", **made).save_pretrained(tmp_path)
    _edit(tmp_path, tensors and tensors(load_file(tmp_path / "model.safetensors")), **changes)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 40))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(torch.asarray(tokens)).logits.numpy()
    assert np.abs(tiny.call(load_model(tmp_path), jnp.asarray(tokens)) - expected).max() <= TOLERANCE


@nnx.jit
def extend(model, tokens, positions, cache):
    return model.extend(tokens, positions, cache)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 8}),
        ("Mistral", {"sliding_window": 7}),
        ("SmolLM3", {"no_rope_layer_interval": 2}),
        ("Olmo2", {}),
        ("Granite", GRANITE),
        ("Gemma3", GEMMA),
        ("Phi3", {"partial_rotary_factor": 0.5}),
    ],
)
def test_greedy_tokens_equal_transformers(tmp_path, family, changes):
    expected_model = reference(family, **changes)
    expected_model.save_pretrained(tmp_path)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    expected = [
        expected_model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert generate(load_model(tmp_path), prompts, max_new_tokens=20) == expected


FAMILIES = [
    ("Llama", {"attention_bias": True, "mlp_bias": True}),
    ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    ("Mistral", {"sliding_window": 7}),
    ("SmolLM3", {"no_rope_layer_interval": 2}),
    ("Olmo2", {}),
    ("Granite", GRANITE),
    ("Gemma3", GEMMA),
    ("Phi3", {"partial_rotary_factor": 0.5}),
]


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_adapters_go_to_peft_and_back(tmp_path, family, changes):
    peft = pytest.importorskip("peft")
    reference(family, **changes).save_pretrained(tmp_path / "base")
    patterns = {"rank_pattern": {"down_proj": 5, "o_proj": 2}, "alpha_pattern": {"q_proj": 7, "mlp.*": 2.5}}
    options = {"rngs": nnx.Rngs(0), "b_init": nnx.initializers.normal(0.3), **patterns}
    model = inject_lora(load_model(tmp_path / "base"), 3, 12, "all-linear", **options)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 20))
    ours = tiny.call(model, jnp.asarray(tokens))
    names = (huggingface_module, joined_modules(model.config.model_type))
    save_peft(tmp_path / "ours", model, "base", *names)
    theirs = peft.PeftModel.from_pretrained(reference(family, **changes), tmp_path / "ours")
    with torch.no_grad():
        assert np.abs(theirs(torch.asarray(tokens)).logits.numpy() - ours).max() <= TOLERANCE
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        expected = theirs(torch.asarray(tokens)).logits.numpy()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = load_model(tmp_path / "base")
    assert inject_peft(tmp_path / "theirs", again, "base", *names) == 7 * model.config.num_layers
    assert np.abs(tiny.call(again, jnp.asarray(tokens)) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"v_proj": 3}}])
def test_parts_of_phi3s_joined_projections(tmp_path, options):
    peft = pytest.importorskip("peft")
    reference("Phi3").save_pretrained(tmp_path / "base")
    names, tokens = (huggingface_module, joined_modules("phi3")), np.random.default_rng(0).integers(0, 61, (2, 20))

    def loaded():
        return load_model(tmp_path / "base")

    def logits(model):
        with torch.no_grad():
            return model(torch.asarray(tokens)).logits.numpy()

    # From there, with ranks by pattern: three parts that share one A, which go back as they came.
    changes = {name: value for name, value in options.items() if name != "rank_pattern"}
    if "rank_pattern" in options:
        changes["rank_pattern"], changes["alpha_pattern"] = {"qkv_proj": 5}, {"gate_up_proj": 3}
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["qkv_proj", "gate_up_proj"], **changes)
    theirs = peft.get_peft_model(reference("Phi3"), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, mean=1.0 if "magnitude" in name else 0.0, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    model = loaded()
    assert inject_peft(tmp_path / "theirs", model, "base", *names) == 5 * model.config.num_layers
    assert np.abs(tiny.call(model, jnp.asarray(tokens)) - logits(theirs)).max() <= TOLERANCE
    assert save_peft(tmp_path / "back", model, "base", *names) == 2 * model.config.num_layers
    there, back = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("theirs", "back"))
    assert there.keys() == back.keys()
    assert all(np.array_equal(there[key], back[key]) for key in there)

    # From here: parts that each have an A, of which one may have none.
    parts = ["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"] if "use_dora" in options else ["q_proj", "v_proj"]
    ours = inject_lora(
        loaded(),
        2,
        6,
        parts,
        rngs=nnx.Rngs(0),
        b_init=nnx.initializers.normal(0.3),
        alpha_pattern={"v_proj": 2},
        **options,
    )
    save_peft(tmp_path / "ours", ours, "base", *names)
    read = peft.PeftModel.from_pretrained(reference("Phi3"), tmp_path / "ours")
    assert np.abs(logits(read) - tiny.call(ours, jnp.asarray(tokens))).max() <= TOLERANCE
    again = loaded()
    inject_peft(tmp_path / "ours", again, "base", *names)
    assert np.abs(tiny.call(again, jnp.asarray(tokens)) - tiny.call(ours, jnp.asarray(tokens))).max() <= TOLERANCE


def test_what_phi3s_joined_projections_cannot_hold(tmp_path):
    names = (huggingface_module, joined_modules("phi3"))
    model = inject_lora(tiny.decoder(model_type="phi3"), 2, 4, "qv", rngs=nnx.Rngs(0), use_dora=True)
    with pytest.raises(ValueError, match=r"DoRA was trained in q_proj, v_proj alone, which PEFT cannot hold"):
        save_peft(tmp_path / "dora", model, "base", *names)
    model = inject_lora(tiny.decoder(model_type="phi3"), 2, 4, "qv", rngs=nnx.Rngs(0), modules_to_save=["k_proj"])
    with pytest.raises(
        ValueError, match=r"k_proj is trained whole, and is a part of model.layers.0.self_attn.qkv_proj"
    ):
        save_peft(tmp_path / "whole", model, "base", *names)
    assert not list(tmp_path.iterdir())
