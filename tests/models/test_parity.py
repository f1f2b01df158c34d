"""Against transformers on random models, in PyTorch float32."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stable_lora_jax.models import generate, load_model, save_huggingface
from tests.models import tiny

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


def reference(family, **changes):
    """A random transformers model; weights large enough that attention is far from uniform, biases not zero."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
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
            **changes,
        }
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
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
    # Written again, transformers has the same model, tied where it was.
    save_huggingface(tmp_path / "again", model)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.asarray(tokens)).logits.numpy(), expected)
    tied = changes.get("tie_word_embeddings", False)
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


def test_greedy_tokens_equal_transformers(tmp_path):
    expected_model = reference("Qwen2")
    expected_model.save_pretrained(tmp_path)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    expected = [
        expected_model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert generate(load_model(tmp_path), prompts, max_new_tokens=20) == expected
