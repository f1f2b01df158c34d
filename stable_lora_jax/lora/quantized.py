"""Frozen weights in 8 or 4 bits, so that a larger base fits: QLoRA (arXiv 2305.14314), quantized by Qwix.

Only the kernels of Linear layers are quantized: biases, norms, embeddings and the output layer keep their
dtype, and so do adapters. A kernel is read back to the computation's dtype where it is used, in the forward pass and
again in the backward pass, so that a model which runs its layers in a loop, as ours does, never holds a float copy of
the base. Of layers that are written out one after the other, the compiler may keep what was read back.

Deviation from the paper: the scales of nf4 stay in float32 instead of being quantized once more, which takes 0.5 bit a
weight instead of 0.127. On a CPU, XLA unpacks 4 bits to 8 while a step runs; stored, they are 4.
"""

import math
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from stable_lora_jax.extras import needs
from stable_lora_jax.lora.injection import adapted_paths, check_one_name, dotted, listed, modules_at, place

QUANTIZATIONS = ("int8", "nf4")
_NF4_BLOCK = 64

Model = TypeVar("Model", bound=nnx.Module)


class QuantizedLinear(nnx.Linear):
    """y = x W + b with W = scale · value: a Linear layer that is frozen and small.

    "int8" has one scale a column of W, whose largest entry is 127.5 steps. "nf4" gives each entry one of 16 values, the
    quantiles of a normal distribution, and has one scale a column and block of 64 rows (gcd(64, n) rows if 64 does not
    divide n).

    Args:
      linear: the layer to quantize; kernel (..., n, m), any leading axes.
      kind: "int8" or "nf4".

    Attributes:
      kernel: the values as integers, int8 or uint4 (an index); shape (..., n, m).
      scale: float32; shape (..., blocks, m), with one block for int8.
      bias: as in `linear`.
    """

    def __init__(self, linear: nnx.Linear, kind: str):
        # Not super().__init__, which would draw a float kernel first.
        self.kind = kind
        self.in_features, self.out_features, self.use_bias = linear.in_features, linear.out_features, linear.use_bias
        self.dtype, self.param_dtype = linear.dtype, linear.kernel.dtype
        self.precision, self.preferred_element_type = linear.precision, linear.preferred_element_type
        value, scale = _quantize(linear.kernel[...], kind)
        self.kernel, self.scale, self.bias = nnx.Param(value), nnx.Param(scale), linear.bias

    def __call__(self, inputs: Num[Array, "*batch n"], out_sharding: Any = None) -> Float[Array, "*batch m"]:
        """Returns what `nnx.Linear` returns, from the quantized kernel."""
        x = inputs.astype(self.dtype or jnp.promote_types(inputs.dtype, self.param_dtype))
        options = self.precision, self.preferred_element_type, out_sharding
        y = _product(x, self.kernel[...], self.scale[...], self.kind, *options)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def quantize_linears(model: Model, kind: str) -> Model:
    """Returns `model`, changed in place: each `nnx.Linear`, but for one called lm_head, is now a `QuantizedLinear`.

    Adapters come after: `inject_lora` puts them around quantized layers as around others.

    Args:
      model: holds plain Linear layers at any depth, without adapters.
      kind: "int8" or "nf4".

    Raises:
      ValueError: an unknown kind; the model has adapters, or quantized layers already; it has a Linear layer of a
        subclass or with a `dot_general` of its own; it is a Linear layer itself, or has one under two names or in a
        tuple. The model is then unchanged.

    Examples:
      >>> model = quantize_linears(nnx.Sequential(nnx.Linear(64, 16, rngs=nnx.Rngs(0))), "int8")
      >>> model.layers[0].kernel.dtype
      dtype('int8')
    """
    if kind not in QUANTIZATIONS:
        raise ValueError(f"quantize={kind!r} is unknown. Known: {', '.join(QUANTIZATIONS)}.")
    if present := adapted_paths(model):
        raise ValueError(
            f"The model has LoRA adapters, at {listed(present)}. Quantize the base model, and inject or load the "
            "adapters after that."
        )
    linears = {path: linear for path, linear in modules_at(model, nnx.Linear).items() if path[-1:] != ("lm_head",)}
    if done := [dotted(path) for path, linear in linears.items() if isinstance(linear, QuantizedLinear)]:
        raise ValueError(
            f"The model is quantized already, at {listed(done)}. Quantizing rounded values again would lose the "
            "weights: load the model without quantizing it, and quantize that."
        )
    if other := [dotted(path) for path, linear in linears.items() if not _is_plain(linear)]:
        raise ValueError(
            f"The layers {listed(other)} are of a subclass of nnx.Linear or have a dot_general of their own, which a "
            "quantized layer would not have. Only plain nnx.Linear layers can be quantized."
        )
    check_one_name(model, linears.values())
    places = {path: place(model, path) for path in linears}
    for path, linear in linears.items():
        places[path](QuantizedLinear(linear, kind))
    return model


def _is_plain(linear: nnx.Linear) -> bool:
    return type(linear) is nnx.Linear and linear.dot_general is jax.lax.dot_general


@partial(jax.jit, static_argnums=1)
def _quantize(kernel: Float[Array, "*stack n m"], kind: str) -> tuple[Array, Float[Array, "*stack blocks m"]]:
    """Returns integers and scales, one matrix of the stack after the other: the search for nf4 takes 16 times it."""
    *stack, fan_in, fan_out = kernel.shape
    tiles = {0: math.gcd(_NF4_BLOCK, fan_in)} if kind == "nf4" else {}

    with needs("quantize"):
        import qwix

    def quantize(matrix: Float[Array, "n m"]) -> tuple[Array, Array]:
        found = qwix.quantize(matrix.astype(jnp.float32), kind, channelwise_axes=(1,), tiled_axes=tiles)
        return found.qvalue, found.scale

    found = jax.lax.map(quantize, kernel.reshape(-1, fan_in, fan_out))
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), found)


# Computed again in the backward pass: else the scan over layers would keep the kernels of all of them in float.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=(3, 4, 5, 6))
def _product(
    x: Array,
    value: Array,
    scale: Array,
    kind: str,
    precision: PrecisionLike,
    preferred_element_type: DTypeLike | None,
    out_sharding: Any,
) -> Array:
    with needs("quantize"):
        import qwix
    kernel = qwix.dequantize(qwix.QArray(value, scale, qtype=kind)).astype(x.dtype)
    return jnp.matmul(
        x, kernel, precision=precision, preferred_element_type=preferred_element_type, out_sharding=out_sharding
    )
