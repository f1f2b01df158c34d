"""The shrink finds and treats the adapters that other libraries make, in their own training loops.

Every test builds a small model with the real library, trains it, and has `Watch` compare each step with NumPy. Tunix is
in test_tunix.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import linen as nn
from flax import nnx
from safetensors.numpy import load_file

from stable_lora_jax.lora import inject_lora, save_peft
from tests.ecosystem.watching import Watch, beside
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Qwix uses what Flax has renamed

FAN_IN, WIDTH, FAN_OUT, RANK, ALPHA, STEPS = 24, 16, 12, 4, 1, 60
LEARNING_RATE, LAM = 2e-2, 0.02
RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(32, FAN_IN)), jnp.float32)
Y = jnp.asarray(RANDOM.normal(size=(32, FAN_OUT)), jnp.float32)


def train_nnx(model, watch, x=X, y=Y):
    """Trains the LoRA parameters of an NNX model; returns them and the optimizer's state."""
    optimizer = nnx.Optimizer(model, watch.tx, wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(x) - y) ** 2)

        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))

    for _ in range(STEPS):
        step(model, optimizer)
    return nnx.state(model, nnx.LoRAParam), optimizer.opt_state


def train(params, loss, tx):
    """Trains a tree of arrays; returns it and the optimizer's state."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params, state


def perceptron(dtype=jnp.float32):
    linear = [nnx.Linear(*sizes, param_dtype=dtype, rngs=nnx.Rngs(0)) for sizes in ((FAN_IN, WIDTH), (WIDTH, FAN_OUT))]
    return nnx.Sequential(linear[0], nnx.relu, linear[1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_qwix_on_an_nnx_model(dtype):
    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA)
    model = qwix.apply_lora_to_model(perceptron(dtype), provider, X, rngs=nnx.Rngs(1))
    assert model.layers[0].kernel_lora_a.dtype == dtype
    # In bfloat16 this λ rounds away unless it is collected.
    watch = Watch(LEARNING_RATE, LAM) if dtype == jnp.float32 else Watch(LEARNING_RATE, 0.0015)
    watch.check(*train_nnx(model, watch), beside("layers/0/kernel_lora", "layers/2/kernel_lora"))


class LinenPerceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(FAN_OUT, name="up")(nn.relu(nn.Dense(WIDTH, name="down")(x)))


def test_qwix_on_a_linen_model():
    model = qwix.apply_lora_to_model(LinenPerceptron(), qwix.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA))
    params = model.init(jax.random.key(0), X)["params"]
    watch = Watch(LEARNING_RATE, LAM)

    def kind(path, _):
        return "lora" if "lora" in jax.tree_util.keystr(path) else "frozen"

    labels = jax.tree_util.tree_map_with_path(kind, params)
    tx = optax.partition({"lora": watch.tx, "frozen": optax.set_to_zero()}, labels)
    state = train(params, lambda params: jnp.mean((model.apply({"params": params}, X) - Y) ** 2), tx)
    watch.check(*state, beside("down/kernel_lora", "up/kernel_lora"))


def test_flax_lora():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.down = nnx.LoRALinear(FAN_IN, WIDTH, lora_rank=RANK, rngs=rngs)
            self.up = nnx.LoRA(*(WIDTH, RANK, FAN_OUT), base_module=nnx.Linear(WIDTH, FAN_OUT, rngs=rngs), rngs=rngs)

        def __call__(self, x):
            return self.up(nnx.relu(self.down(x)))

    watch = Watch(LEARNING_RATE, LAM)
    watch.check(*train_nnx(Model(nnx.Rngs(0)), watch), beside("down/lora/lora", "up/lora"))


def test_our_injection_into_layers_that_are_scanned():
    model = inject_lora(tiny.decoder(), RANK, ALPHA, "qv", rngs=nnx.Rngs(1))
    watch = Watch(LEARNING_RATE, LAM, stack_axes=(0,))
    state = train_nnx(model, watch, tiny.tokens(), 1.0)
    watch.check(*state, beside("layers/self_attn/q_proj/lora", "layers/self_attn/v_proj/lora"))


def made_by_us(directory):
    model = inject_lora(perceptron(), RANK, ALPHA, ["0", "2"], rngs=nnx.Rngs(1))
    save_peft(directory, model, "mine", lambda path, layer: path.removeprefix("layers."))


def made_by_peft(directory):
    torch = pytest.importorskip("torch", reason="PEFT needs the torch extra")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(FAN_IN, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, FAN_OUT))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0", "2"])
    peft.get_peft_model(model, config).save_pretrained(directory)


@pytest.mark.parametrize("make", [made_by_us, made_by_peft])
def test_a_peft_tree(make, tmp_path):
    make(tmp_path / "adapter")
    params = {key: jnp.asarray(x) for key, x in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()}
    assert params["base_model.model.0.lora_A.weight"].shape == (RANK, FAN_IN)  # torch's orientation
    frozen = {"0": 0.2 * RANDOM.normal(size=(WIDTH, FAN_IN)), "2": 0.2 * RANDOM.normal(size=(FAN_OUT, WIDTH))}

    def layer(params, name, x):
        a, b = (params[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        return x @ frozen[name].T + ALPHA / RANK * (x @ a.T) @ b.T

    def loss(params):
        return jnp.mean((layer(params, "2", jax.nn.relu(layer(params, "0", X))) - Y) ** 2)

    watch = Watch(LEARNING_RATE, LAM)
    names = [f"base_model.model.{name}.lora{{}}.weight" for name in frozen]
    watch.check(*train(params, loss, watch.tx), {n.format(""): (n.format("_A"), n.format("_B")) for n in names})


@pytest.mark.parametrize("axis", [0, 1])
def test_qwix_on_layers_that_linen_scans(axis):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(FAN_IN, name="dense")(nn.relu(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(Layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)
            return layers(name="layers")(x, None)[0]

    model = qwix.apply_lora_to_model(Stack(), qwix.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA))
    params = model.init(jax.random.key(0), X)["params"]
    a = params["layers"]["dense"]["kernel_lora_a"]
    assert a.shape == ((3, FAN_IN, RANK) if axis == 0 else (FAN_IN, 3, RANK))
    watch = Watch(LEARNING_RATE, LAM, stack_axes=(axis,))

    def kind(path, _):
        return "lora" if "lora" in jax.tree_util.keystr(path) else "frozen"

    labels = jax.tree_util.tree_map_with_path(kind, params)
    tx = optax.partition({"lora": watch.tx, "frozen": optax.set_to_zero()}, labels)
    y = X[::-1]
    state = train(params, lambda params: jnp.mean((model.apply({"params": params}, X) - y) ** 2), tx)
    watch.check(*state, beside("layers/dense/kernel_lora"))
