"""Adapters of the embedding and of the output layer, tied to each other or not."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from stable_lora_jax import optim
from stable_lora_jax.cli import main
from stable_lora_jax.lora import (
    LoRAEmbed,
    LoRATiedHead,
    inject_lora,
    inject_peft,
    load_adapter,
    lora_modules,
    merge_lora,
    read_adapter_spec,
    save_adapter,
    save_peft,
)
from stable_lora_jax.lora.peft_files import WEIGHTS
from stable_lora_jax.models import huggingface_module, load_model, save_huggingface
from stable_lora_jax.training import read_metrics
from tests.models import tiny

BASE = "owner/Tiny-Model"
TOKENS = tiny.tokens()
TARGETS = ("q_proj", "embed_tokens", "lm_head")
FAMILIES = {
    "llama": {},
    "tied": {"tie_embeddings": True},
    "gemma3": {"tie_embeddings": True, "embedding_scale": 24**0.5, "logits_scale": 0.5},
}


def adapted(targets=TARGETS, **changes):
    """A tiny model whose adapters are all random."""
    model = inject_lora(tiny.decoder(**changes), 2, 4, targets, rngs=nnx.Rngs(1))
    random = np.random.default_rng(0)
    for module in lora_modules(model).values():
        for param in (module.lora_a, module.lora_b):
            param[...] = jnp.asarray(random.normal(0, 0.3, param.shape), jnp.float32)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_each_adapter_acts_in_its_own_place(family):
    changes = FAMILIES[family]
    model, base = adapted(**changes), tiny.decoder(**changes)
    embed, head = lora_modules(model)["embed_tokens"], lora_modules(model)["lm_head"]
    assert isinstance(embed, LoRAEmbed)
    assert isinstance(head, LoRATiedHead) == ("tie_embeddings" in changes)
    table = base.embed_tokens.embedding[...]
    output = table.T if base.lm_head is None else base.lm_head.kernel[...]
    # The same by weights: an embedding W + s A B, and an output layer of its own.
    plain = tiny.decoder(**changes)
    if plain.lm_head is None:
        plain.untie()
    plain = inject_lora(plain, 2, 4, ["q_proj"], rngs=nnx.Rngs(1))
    plain.layers.self_attn.q_proj.lora_a[...] = model.layers.self_attn.q_proj.lora_a[...]
    plain.layers.self_attn.q_proj.lora_b[...] = model.layers.self_attn.q_proj.lora_b[...]
    plain.embed_tokens.embedding[...] = table + 2 * embed.lora_a[...] @ embed.lora_b[...]
    plain.lm_head.kernel[...] = output + 2 * head.lora_a[...] @ head.lora_b[...]
    np.testing.assert_allclose(tiny.call(model, TOKENS), tiny.call(plain, TOKENS), atol=1e-4)
    hidden, read = plain.hidden_states(TOKENS), jnp.roll(TOKENS, -1, axis=1)
    np.testing.assert_allclose(
        model.log_likelihoods(hidden, read), plain.log_likelihoods(hidden, read), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_one_changes_nothing_and_both_matrices_learn(family):
    changes = FAMILIES[family]
    model = inject_lora(tiny.decoder(**changes), 2, 4, TARGETS, rngs=nnx.Rngs(1), dropout=0.1)
    model.eval()
    np.testing.assert_array_equal(tiny.call(model, TOKENS), tiny.call(tiny.decoder(**changes), TOKENS))
    model.train()
    before = {path: jnp.copy(param[...]) for path, param in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))}
    optimizer = nnx.Optimizer(model, optax.chain(optax.adamw(1e-2), optim.stable_lora_shrink(0.1)), wrt=nnx.LoRAParam)
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    for _ in range(3):
        gradients = nnx.grad(lambda m: jnp.sum(m(TOKENS) ** 2), argnums=wrt)(model)
        optimizer.update(model, gradients)
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        assert (param[...] != before[path]).any(), path
    # Zero is small enough: the shrink leaves an embedding's A alone from the first step on.
    flags = optim.stability(nnx.state(model, nnx.LoRAParam), optimizer.opt_state)
    assert flags["embed_tokens/lora"].stable
    assert not flags["lm_head/lora"].stable


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_it_is_a_plain_model_that_a_directory_keeps(family, tmp_path):
    changes = FAMILIES[family]
    for targets in (TARGETS, ("embed_tokens",), ("lm_head",)):
        model = adapted(targets, **changes)
        expected = tiny.call(model, TOKENS)
        merged = merge_lora(model)
        assert not lora_modules(merged)
        assert not merged.config.tie_embeddings
        np.testing.assert_allclose(tiny.call(merged, TOKENS), expected, atol=1e-4)
    if family != "gemma3":  # whose scales this tiny configuration does not have from a family
        save_huggingface(tmp_path / "merged", merged)
        np.testing.assert_array_equal(
            tiny.call(load_model(str(tmp_path / "merged")), TOKENS), tiny.call(merged, TOKENS)
        )


def test_merging_asks_whether_the_embedding_is_the_output_layer_too():
    class TwoTower(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.out = nnx.Embed(7, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    model = inject_lora(TwoTower(nnx.Rngs(0)), 2, 4, "embed,out", rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="nothing says whether the embedding is the output layer too"):
        merge_lora(model)
    assert len(lora_modules(model)) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_files_keep_them(family, tmp_path):
    changes = FAMILIES[family]
    model = adapted(**changes)
    save_adapter(tmp_path / "a.safetensors", model, BASE)
    spec = read_adapter_spec(tmp_path / "a.safetensors")
    again = inject_lora(tiny.decoder(**changes), spec.rank, spec.alpha, spec.targets, rngs=nnx.Rngs(0))
    load_adapter(tmp_path / "a.safetensors", again, BASE)
    save_peft(tmp_path / "peft", model, BASE, huggingface_module)
    imported = tiny.decoder(**changes)
    assert inject_peft(tmp_path / "peft", imported, BASE, huggingface_module) == 2 + model.config.num_layers
    for other in (again, imported):
        np.testing.assert_array_equal(tiny.call(other, TOKENS), tiny.call(model, TOKENS))


@pytest.mark.filterwarnings("ignore")  # PEFT says of tied weights what is tested here
@pytest.mark.parametrize("kind", ["llama", "tied", "gemma3_text"])
def test_peft_computes_the_same_both_ways(kind, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        "gemma3_text" if kind == "gemma3_text" else "llama",
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        tie_word_embeddings=kind != "llama",
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")

    def reference():
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)

    def logits(model):
        with torch.no_grad():
            return model(torch.asarray(np.array(TOKENS))).logits.numpy()

    def moved():
        model = inject_lora(load_model(str(tmp_path / "base")), 2, 4, TARGETS, rngs=nnx.Rngs(1))
        random = np.random.default_rng(0)
        for module in lora_modules(model).values():
            for param in (module.lora_a, module.lora_b):
                param[...] = jnp.asarray(random.normal(0, 0.3, param.shape), jnp.float32)
        return model

    model = moved()
    base = logits(reference())
    np.testing.assert_allclose(tiny.call(load_model(str(tmp_path / "base")), TOKENS), base, atol=1e-4)
    save_peft(tmp_path / "peft", model, "base", huggingface_module)
    theirs = logits(peft.PeftModel.from_pretrained(reference(), tmp_path / "peft"))
    np.testing.assert_allclose(theirs, tiny.call(model, TOKENS), atol=1e-4)
    assert np.abs(theirs - base).max() > 0.1

    trained = peft.get_peft_model(reference(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(TARGETS)))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    trained.save_pretrained(tmp_path / "trained")  # with the frozen weights of both ends
    assert any(name.endswith("base_layer.weight") for name in load_file(tmp_path / "trained" / WEIGHTS))
    again = load_model(str(tmp_path / "base"))
    inject_peft(tmp_path / "trained", again, "base", huggingface_module)
    np.testing.assert_allclose(tiny.call(again, TOKENS), logits(trained), atol=1e-4)


def test_a_base_that_had_been_changed_is_refused(tmp_path):
    save_peft(tmp_path / "peft", adapted(("embed_tokens",)), BASE, huggingface_module)
    file, base = tmp_path / "peft" / WEIGHTS, tiny.decoder()
    tensors, table = load_file(file), np.array(base.embed_tokens.embedding[...])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**tensors, key: table.astype(jnp.bfloat16)}, file)  # as PEFT stores what it loaded in bfloat16
    assert inject_peft(tmp_path / "peft", base, BASE, huggingface_module) == 1
    for changed in (np.pad(table, ((0, 1), (0, 0))), table + 1):
        save_file({**tensors, key: changed}, file)
        with pytest.raises(ValueError, match="a base that had been changed, such as by more tokens"):
            inject_peft(tmp_path / "peft", tiny.decoder(), BASE, huggingface_module)


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ("embed_tokens", {"use_dora": True}, "DoRA is not for embed_tokens"),
        ("q_proj,embed_tokens", {"modules_to_save": ["embed_tokens"]}, "are targets and modules_to_save"),
        (r".*embed.*", {}, "match no Linear layer"),
        ("q_proj,head", {}, r"LoRA targets \['head'\] match no layer.*embed_tokens, lm_head"),
    ],
)
def test_what_cannot_be_is_refused(targets, options, message):
    model = tiny.decoder(tie_embeddings=True)
    with pytest.raises(ValueError, match=message):
        inject_lora(model, 2, 4, targets, rngs=nnx.Rngs(1), **options)
    assert not lora_modules(model)


def test_the_command_trains_and_exports_them(model_dir, data_file, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["train", "--model", model_dir, "--data", data_file, "--rank", 2, "--targets", ",".join(TARGETS)]
    flags += ["--learning-rate", "1e-2", "--steps", 6, "--batch-size", 4, "--dropout", 0.1, "--run-dir", run]
    assert main(list(map(str, flags))) == 0
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    assert main(["export", str(run), str(tmp_path / "merged"), "--format", "merged"]) == 0
    assert main(["export", str(run), str(tmp_path / "a.gguf"), "--format", "gguf"]) == 2
    assert "Adapters of embed_tokens, lm_head are not written as GGUF" in capsys.readouterr().err
    texts = []
    for model in (["--model", str(model_dir), "--adapter", str(run)], ["--model", str(tmp_path / "merged")]):
        assert main(["generate", *model, "--prompt", "1+1?"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
