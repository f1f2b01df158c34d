"""A Tunix model with einsum adapters, in Tunix's own trainer.

Tunix's pins clash with ours, so it has an environment of its own: make test-tunix.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stable_lora_jax.lora import inject_lora, merge_lora
from tests.documents import programs
from tests.ecosystem.watching import Watch, beside

pytest.importorskip("tunix", reason="Tunix has an environment of its own: make test-tunix")

import qwix
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

pytestmark = pytest.mark.filterwarnings("ignore")  # Tunix's own

STEPS, LENGTH, VOCABULARY = 60, 8, 32
CONFIG = ModelConfig(
    num_layers=1, vocab_size=VOCABULARY, embed_dim=24, hidden_dim=32, num_heads=6, head_dim=4, num_kv_heads=2,
    rope_theta=10_000, norm_eps=1e-5,
)  # fmt: skip
NAMES = [f"layers/0/{name}_lora" for name in ("attn/q_proj/w", "attn/o_proj/w", "mlp/gate_proj/kernel")]


def model_input(batch):
    length = batch.input_tokens.shape[1]
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": jnp.broadcast_to(jnp.arange(length), batch.input_tokens.shape),
        "attention_mask": jnp.tril(jnp.ones((1, length, length), bool)),
    }


def batches(count):
    random = np.random.default_rng(0)
    for _ in range(count):
        # Counting upwards from anywhere can be learnt.
        tokens = (random.integers(0, VOCABULARY, (4, 1)) + np.arange(LENGTH)) % VOCABULARY
        yield TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens))


def adapted():
    """A Llama with adapters that Qwix made for its einsums."""
    provider = qwix.LoraProvider(module_path=".*(q_proj|o_proj|gate_proj)", rank=3, alpha=1.0)
    inputs = model_input(next(batches(1)))
    return qwix.apply_lora_to_model(
        *(Llama3(CONFIG, rngs=nnx.Rngs(0)), provider, inputs["input_tokens"], inputs["positions"], None),
        *(inputs["attention_mask"],),
        rngs=nnx.Rngs(1),
    )


def test_einsum_adapters_in_tunix_own_trainer():
    model = adapted()
    attention = model.layers[0].attn
    assert (attention.q_proj.w_lora_a.shape, attention.q_proj.w_lora_b.shape) == ((24, 3), (3, 6, 4))
    assert (attention.o_proj.w_lora_a.shape, attention.o_proj.w_lora_b.shape) == ((6, 4, 3), (3, 24))
    watch = Watch(2e-2, 0.02, stack_axes=())
    trainer = PeftTrainer(model, watch.tx, TrainingConfig(eval_every_n_steps=1000, max_steps=STEPS))
    trainer.with_gen_model_input_fn(model_input).train(batches(STEPS))
    watch.check(nnx.state(model, nnx.LoRAParam), trainer.optimizer.opt_state, beside(*NAMES))


def test_our_own_adapters_inside_tunix_model():
    """Its MLP is of Linear layers, which `inject_lora` finds; its einsums are Qwix's, as above."""
    model, random = Llama3(CONFIG, rngs=nnx.Rngs(0)), nnx.Rngs(2)
    for linear in (model.layers[0].mlp.gate_proj, model.layers[0].mlp.up_proj, model.layers[0].mlp.down_proj):
        linear.kernel[...] = 0.2 * jax.random.normal(random.params(), linear.kernel.shape)  # they begin at zero
    inject_lora(model, 3, 6.0, ["gate_proj", "down_proj"], rngs=nnx.Rngs(1))
    watch = Watch(2e-2, 0.05, stack_axes=())
    trainer = PeftTrainer(model, watch.tx, TrainingConfig(eval_every_n_steps=1000, max_steps=STEPS))
    trainer.with_gen_model_input_fn(model_input).train(batches(STEPS))
    names = [f"layers/0/mlp/{name}/lora" for name in ("gate_proj", "down_proj")]
    watch.check(nnx.state(model, nnx.LoRAParam), trainer.optimizer.opt_state, beside(*names))
    inputs = model_input(next(batches(1)))
    arguments = inputs["input_tokens"], inputs["positions"], None, inputs["attention_mask"]
    expected = model(*arguments)[0]
    np.testing.assert_allclose(merge_lora(model)(*arguments)[0], expected, rtol=1e-4, atol=1e-4)


def test_the_program_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = adapted()
    start = model.layers[0].attn.q_proj.w_lora_a[...].copy()
    names = {"model": model, "model_input": model_input, "batches": batches(30)}
    exec(programs("docs/use/tunix.md")[0], names)
    history = names["history"]
    assert list(history) == [0, 5, 10, 15, 20, 25]
    assert history[0].keys() == set(NAMES)
    norms = [float(report[NAMES[0]].norm_a) for report in history.values()]
    assert norms == sorted(norms, reverse=True)
    assert len(set(norms)) == len(norms)  # the trainer's own, as it is at each step
    assert (tmp_path / "stability.png").stat().st_size > 10_000
    shrunk = jnp.linalg.norm(model.layers[0].attn.q_proj.w_lora_a[...]) / jnp.linalg.norm(start)
    np.testing.assert_allclose(shrunk, (1 - 0.005) ** 30, rtol=0.05)  # AdamW moves A too
