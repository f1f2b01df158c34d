"""Adapters leave for PEFT and return: the real PEFT, the real model."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from stable_lora_jax.assets.packaged import smollm2_gguf
from stable_lora_jax.cli import main
from stable_lora_jax.cli.export import vllm_notes
from stable_lora_jax.data import load_tokenizer
from stable_lora_jax.lora import (
    AdapterSpec,
    inject_lora,
    inject_peft,
    lora_modules,
    merge_lora,
    save_adapter,
    save_peft,
)
from stable_lora_jax.models import huggingface_module, load_model
from tests.models import tiny

BASE = "owner/Tiny-Model"


def adapted(targets="qkvogud", **options):
    """A tiny model whose adapters are all random."""
    model = tiny.decoder()
    inject_lora(model, 3, 6, targets, rngs=nnx.Rngs(1), b_init=nnx.initializers.normal(0.3), **options)
    return model


def export(tmp_path, model, base=BASE):
    save_peft(tmp_path / "peft", model, base, huggingface_module)
    return tmp_path / "peft"


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"dtype": jnp.bfloat16}])
def test_an_adapter_returns_bitwise(tmp_path, options):
    model = adapted(**options)
    directory = export(tmp_path, model)
    again = tiny.decoder()
    layers = model.config.num_layers
    assert inject_peft(directory, again, BASE, huggingface_module) == 7 * layers
    for path, module in lora_modules(model).items():
        other = lora_modules(again)[path]
        assert (other.scale, other.lora_a.dtype) == (module.scale, module.lora_a.dtype)
        np.testing.assert_array_equal(other.lora_a[...], module.lora_a[...])
        np.testing.assert_array_equal(other.lora_b[...], module.lora_b[...])


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_files_say_what_peft_and_vllm_read(tmp_path, use_rslora):
    directory = export(tmp_path, adapted("qv", use_rslora=use_rslora))
    config = json.loads((directory / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": use_rslora,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "modules_to_save": None,
        "base_model_name_or_path": BASE,
    }
    assert {key: config[key] for key in expected} == expected
    with safe_open(directory / "adapter_model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("rank", "targets", "notes"),
    [
        (3, ("layers.self_attn.q_proj", "layers.mlp.down_proj"), []),
        (16, ("layers.self_attn.q_proj",), []),
        (17, ("layers.self_attn.q_proj",), ["rank 17 with --max-lora-rank 32."]),
        (320, ("layers.self_attn.q_proj",), ["rank 320 with --max-lora-rank 320."]),
        (513, ("layers.self_attn.q_proj",), ["ranks up to 512; this adapter has 513"]),
        (24, ("layers.mlp.up_proj", "lm_head"), ["--max-lora-rank 32", "may not load adapters on lm_head"]),
    ],
)
def test_what_vllm_needs_to_be_told(rank, targets, notes):
    told = vllm_notes(AdapterSpec(base=BASE, rank=rank, alpha=16, use_rslora=False, targets=targets), rank)
    assert len(told) == len(notes)
    assert all(part in note for part, note in zip(notes, told, strict=True))


def test_what_vllm_does_not_load_is_said():
    spec = AdapterSpec(base=BASE, rank=8, alpha=16, use_rslora=False, targets=("q",), use_dora=True, whole=("norm",))
    assert vllm_notes(spec, 8)[0].startswith("vLLM loads no adapters with DoRA and modules_to_save")


def test_any_model_may_be_exported(tmp_path):
    model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    inject_lora(model, 2, 4, [r"layers.0"], rngs=nnx.Rngs(1))
    save_peft(tmp_path / "out", model, "mine", lambda path, layer: path)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {key: x.shape for key, x in tensors.items()} == {
        "base_model.model.layers.0.lora_A.weight": (2, 6),
        "base_model.model.layers.0.lora_B.weight": (4, 2),
    }


def test_targets_have_the_names_that_the_file_has(tmp_path):
    model = inject_lora(nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))), 2, 4, ["0"], rngs=nnx.Rngs(1))
    save_peft(tmp_path / "out", model, "mine", lambda path, layer: path.replace("layers.0", "model.first"))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == ["first"]


def test_targets_name_no_module_that_has_no_adapter(tmp_path):
    def linear(seed):
        return nnx.Linear(6, 4, rngs=nnx.Rngs(seed))

    model = nnx.Dict(encoder=nnx.Dict(q=linear(0), v=linear(1)), decoder=nnx.Dict(q=linear(2)))
    inject_lora(model, 2, 4, ["encoder.q", "v"], rngs=nnx.Rngs(3))
    save_peft(tmp_path / "out", model, "mine", lambda path, layer: path)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == ["encoder.q", "v"]


def test_layers_stacked_over_two_axes_are_refused(tmp_path):
    def stacked():
        make = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))
        both = nnx.split_rngs(splits=2)(nnx.vmap(nnx.split_rngs(splits=3)(make)))(nnx.Rngs(0))
        return nnx.Dict(experts=both, out=nnx.Linear(4, 4, rngs=nnx.Rngs(1)))

    def name(path, layer):
        return path if layer is None else f"{path}.{layer}"

    model = inject_lora(stacked(), 2, 4, r".*", rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"experts is stacked over several axes, A \(2, 3, 4, 2\)"):
        save_peft(tmp_path / "none", model, "mine", name)
    assert not (tmp_path / "none").exists()
    # Beside such layers, others come and go.
    save_peft(tmp_path / "one", inject_lora(stacked(), 2, 4, ["out"], rngs=nnx.Rngs(1)), "mine", name)
    assert inject_peft(tmp_path / "one", stacked(), "mine", name) == 1


def change_config(directory, **values):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def drop_from_config(directory, *names):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({key: x for key, x in json.loads(file.read_text()).items() if key not in names}))


def change_tensors(directory, change):
    file = directory / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


Q0_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def not_finite(tensors):
    key = next(key for key in tensors if key.endswith("q_proj.lora_B.weight"))
    return tensors | {
        key: np.where(np.arange(tensors[key].size).reshape(tensors[key].shape) == 5, np.nan, tensors[key])
    }


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.removeprefix("base_model.model.").replace(".weight", ".default.weight"),
        lambda key: key.replace(".weight", ".my_style.weight"),
    ],
    ids=["default", "no prefix", "both", "another name"],
)
def test_names_as_older_files_have_them(tmp_path, rename):
    model = adapted()
    directory = export(tmp_path, model)
    change_tensors(directory, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
    again = tiny.decoder()
    inject_peft(directory, again, BASE, huggingface_module)
    for path, module in lora_modules(model).items():
        np.testing.assert_array_equal(lora_modules(again)[path].lora_b[...], module.lora_b[...])


@pytest.mark.parametrize("narrow", ["lora_A", "lora_B"])
def test_a_file_of_two_dtypes_is_computed_in_the_wider(tmp_path, narrow):
    model = adapted()
    directory = export(tmp_path, model)
    change_tensors(
        directory,
        lambda tensors: {key: x.astype(np.float16) if narrow in key else x for key, x in tensors.items()},
    )
    stored = load_file(directory / "adapter_model.safetensors")
    again = tiny.decoder()
    inject_peft(directory, again, BASE, huggingface_module)
    module = lora_modules(again)["layers.self_attn.q_proj"]
    for ours, side in ((module.lora_a, "lora_A"), (module.lora_b, "lora_B")):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours[0], stored[Q0_A.replace("lora_A", side)].T.astype(np.float32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d), "lacks adapter_config.json and adapter_model.safetensors"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x10"), "is damaged"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "is damaged"),
        (lambda d: drop_from_config(d, "r"), "adapter_config.json lacks r."),
        (lambda d: drop_from_config(d, "r", "lora_alpha"), "adapter_config.json lacks r and lora_alpha."),
        (
            lambda d: change_tensors(
                d,
                lambda t: {k.replace("B.weight", "B.one.weight").replace("A.weight", "A.two.weight"): t[k] for k in t},
            ),
            "holds the adapters one, two in one file",
        ),
        (lambda d: change_config(d, peft_type="LOHA"), "holds a LOHA adapter. Only LORA can be loaded."),
        (lambda d: change_config(d, use_dora=True), "lora_magnitude_vector. The file is not complete"),
        *(
            (lambda d, init=init: change_config(d, init_lora_weights=init), f"uses init_lora_weights='{init}'. Only")
            for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
        ),
        (lambda d: change_config(d, alora_invocation_tokens=[1, 2]), "uses alora_invocation_tokens=[1, 2]"),
        (lambda d: change_config(d, use_qalora=True), "uses use_qalora=True"),
        (lambda d: change_config(d, kasa_config={"beta": 1.0}), "uses kasa_config={'beta': 1.0}"),
        (lambda d: change_config(d, modules_to_save=["lm_head"]), "has nothing of lm_head"),
        (lambda d: change_config(d, modules_to_save="lm_head"), "must be a list of names"),
        (lambda d: change_config(d, bias="all"), "uses bias='all'. Only plain LoRA"),
        (lambda d: change_config(d, rank_pattern={"q_proj": 4}), "its r is not the one in its configuration"),
        (lambda d: change_config(d, rank_pattern={"q_proj": "4"}), "says rank_pattern={'q_proj': '4'}. It must map"),
        (lambda d: change_config(d, alpha_pattern=[1]), "says alpha_pattern=[1]. It must map patterns"),
        (lambda d: change_config(d, alpha_pattern={"(": 1}), "alpha_pattern holds '(', no regular expression"),
        (
            lambda d: change_config(d, alpha_pattern={r"layers\.0\..*q_proj": 1}),
            "alpha_pattern gives q_proj the values [1, 6] in different layers",
        ),
        (lambda d: change_config(d, base_model_name_or_path="other/Base"), "is an adapter for other/Base, not for"),
        (lambda d: change_config(d, r=4), "its r is not the one in its configuration"),
        (
            lambda d: change_tensors(d, lambda t: {k.replace("q_proj", "query"): v for k, v in t.items()}),
            "the model has no match for model.layers.0.self_attn.query",
        ),
        (
            lambda d: change_tensors(d, lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up" not in k}),
            "lacks the matrices of model.layers.1.mlp.up_proj, which its adapter_config.json says are adapted",
        ),
        (
            lambda d: change_tensors(
                d, lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up_proj.lora_B" not in k}
            ),
            "lacks the tensor model.layers.1.mlp.up_proj.lora_B.weight",
        ),
        (lambda d: change_tensors(d, lambda t: {}), "adapts 0 modules"),
        (
            lambda d: change_tensors(d, lambda t: t | {"base_model.model.embed_tokens.weight": np.zeros((2, 2))}),
            "the model has no match for embed_tokens.weight.",
        ),
        *(
            (
                lambda d, r=r: change_config(d, r=r),
                f"says r={r!r}. It must be a positive integer, written without quotes",
            )
            for r in ("4", 0, 3.0, True)
        ),
        (lambda d: change_config(d, lora_alpha="6"), "says lora_alpha='6'. It must be a positive number, written"),
        (lambda d: change_config(d, use_rslora="no"), "says use_rslora='no'. It must be true or false."),
        (
            lambda d: change_tensors(d, not_finite),
            "lora_B.weight holds NaN or infinity. The training that wrote it has",
        ),
        (
            lambda d: change_tensors(
                d, lambda t: t | {k.replace(".weight", ".default.weight"): v for k, v in t.items()}
            ),
            "holds the tensor model.layers.0.mlp.down_proj.lora_A.weight twice",
        ),
        (
            lambda d: change_tensors(d, lambda t: {k: v.astype(np.int32) for k, v in t.items()}),
            "is int32. Adapters are",
        ),
        (
            lambda d: change_tensors(d, lambda t: t | {Q0_A: np.zeros((3, 5), np.float32)}),
            "has lora_A of the shapes [(3, 5), (3, 24)]. All layers of a kind",
        ),
    ],
)
def test_errors_leave_the_model_as_it_was(tmp_path, damage, message):
    directory = export(tmp_path, adapted())
    damage(directory)
    model = tiny.decoder()
    with pytest.raises(ValueError, match=re.escape(message)):
        inject_peft(directory, model, BASE, huggingface_module)
    assert not lora_modules(model)


def test_what_is_there_is_not_overwritten(tmp_path):
    directory = export(tmp_path, adapted())
    with pytest.raises(FileExistsError, match=r"holds .* already"):
        export(tmp_path, adapted())
    assert directory.is_dir()


def test_a_merged_export_has_the_tokens_of_its_tokenizer(tmp_path):
    base = tiny.save_with_tokenizer(tmp_path / "base")
    model = inject_lora(load_model(base), 2, 4.0, "qv", rngs=nnx.Rngs(1))
    save_adapter(tmp_path / "adapter.safetensors", model, str(base))
    assert main(["export", str(tmp_path), str(tmp_path / "merged"), "--format", "merged"]) == 0
    config, tokenizer = AutoConfig.from_pretrained(tmp_path / "merged"), load_tokenizer(base)
    assert (config.bos_token_id, config.eos_token_id) == (None, 256) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The real model with a random adapter, exported by the command line."""
    folder = tmp_path_factory.mktemp("exported")
    model = load_model("smollm2-135m")
    inject_lora(model, 8, 16, "qv", rngs=nnx.Rngs(3), b_init=nnx.initializers.normal(0.02))
    save_adapter(folder / "adapter.safetensors", model, "smollm2-135m")
    assert main(["export", str(folder), str(folder / "peft")]) == 0
    return model, folder / "peft"


def test_the_command_line_loads_it(exported, capsys):
    _, directory = exported
    arguments = ["--prompt", "The capital of France is", "--max-new-tokens", "2", "--adapter", str(directory)]
    assert main(["generate", *arguments]) == 0
    assert "filled 60 modules" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers so
def test_real_peft_loads_it_and_computes_the_same(exported, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model, directory = exported
    file = smollm2_gguf()
    reference = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    text = "Water boils at a lower temperature on a high mountain, because the pressure of the air is lower there."
    tokens = np.array([load_tokenizer("smollm2-135m").encode(text)])

    def logits(module):
        with torch.no_grad():
            return module(torch.asarray(tokens)).logits.numpy()

    base = logits(reference)
    theirs = peft.PeftModel.from_pretrained(reference, directory)
    ours = np.asarray(tiny.call(model, jnp.asarray(tokens)))
    # Float32 sums in another order through 30 layers, logits up to 30; torch is 5e-5 from its own float64.
    assert np.abs(logits(theirs) - ours).max() <= 1e-4
    assert np.abs(base - ours).max() > 0.1
    # Written again by PEFT, and read again by us: the same bits.
    theirs.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    written, rewritten = (load_file(folder / "adapter_model.safetensors") for folder in (directory, tmp_path / "again"))
    assert written.keys() == rewritten.keys()
    for key in written:
        np.testing.assert_array_equal(written[key], rewritten[key])
    other = load_model("smollm2-135m")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert inject_peft(tmp_path / "again", other, config["base_model_name_or_path"] or "any", huggingface_module) == 60
    for path, module in lora_modules(model).items():
        np.testing.assert_array_equal(lora_modules(other)[path].lora_a[...], module.lora_a[...])
        np.testing.assert_array_equal(lora_modules(other)[path].lora_b[...], module.lora_b[...])
    # Merged on both sides.
    merged = np.asarray(tiny.call(merge_lora(other), jnp.asarray(tokens)))
    assert np.abs(logits(theirs.merge_and_unload()) - merged).max() <= 1e-4
