"""Scaled dot-product attention: written out for XLA in blocks, or by a kernel that never forms the scores.

| implementation | where | memory next to queries, keys and values |
|---|---|---|
| xla | everywhere | float32 scores of an eighth of the queries, heads x length² / 8 per row |
| cudnn | NVIDIA GPUs | none where tokens see all before them; else a mask, length² per row |
| splash | TPUs | none |

cuDNN's needs a GPU of the Ampere generation or later, bfloat16 or float16, and heads whose width is a multiple of 8 up
to 128. Which one is used is settled before anything is compiled: `choose_attention` answers a wish that the device
cannot fulfil with the reason.

The splash kernel (`stable_lora_jax.models.splash`) knows documents and a window. Rows in which answers branch from a
shared prompt, and models whose layers have different windows, are computed by "xla" instead; so is generation, with its
cache. Questions' batches have such rows unless they are packed. cuDNN's backward pass takes rows of even
length alone: those of an odd one, which batches of this library do not have, are computed by "xla" too, and so are
sweeps on GPUs (`training.sweep`).
"""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from stable_lora_jax.models.blockwise import blockwise_attention
from stable_lora_jax.models.float32_dot import float32_dot

Attention: TypeAlias = Literal["xla", "cudnn", "splash"]

ATTENTIONS = ("auto", "xla", "cudnn", "splash")
_AMPERE = 8.0  # CUDA compute capability


def choose_attention(wish: str, *, dtype: DTypeLike, head_dim: int, device: Any = None) -> Attention:
    """Returns the implementation to use.

    Args:
      wish: one of `ATTENTIONS`; "auto" takes a kernel where it works.
      dtype: of the computation.
      head_dim: features of a head.
      device: the `jax.Device` where it will run; JAX's first if None.

    Raises:
      ValueError: an unknown wish, or "cudnn" or "splash" where it does not work, with the reason.
    """
    if wish not in ATTENTIONS:
        raise ValueError(f"attention={wish!r} is unknown. Known: {', '.join(ATTENTIONS)}.")
    if wish == "xla":
        return "xla"
    device = device or jax.devices()[0]
    kind = device.platform.upper()
    kernels: tuple[tuple[Attention, str], ...] = (
        ("cudnn", _why_not_cudnn(dtype, head_dim, device)),
        ("splash", "" if kind == "TPU" else f"the device is a {kind}, and the splash kernel is for TPUs"),
    )
    for name, reason in kernels:
        if wish in ("auto", name) and not reason:
            return name
        if wish == name:
            raise ValueError(f"attention={wish!r} does not work here: {reason}. Use 'auto' or 'xla'.")
    return "xla"


def _why_not_cudnn(dtype: DTypeLike, head_dim: int, device: Any) -> str:
    """Returns what is in the way, or nothing."""
    if device.platform not in ("gpu", "cuda"):
        return f"the device is a {device.platform.upper()}, and cuDNN is for NVIDIA GPUs"
    capability = getattr(device, "compute_capability", None)
    try:
        recent = float(capability or 0) >= _AMPERE
    except ValueError:  # of another maker's GPU
        recent = False
    if not recent:
        return f"the device has compute capability {capability}, and cuDNN's attention needs {_AMPERE} (Ampere)"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"the computation is in {jnp.dtype(dtype)}, and cuDNN's attention in bfloat16 or float16"
    if head_dim % 8 or head_dim > 128:
        return f"heads have {head_dim} features, and cuDNN takes multiples of 8 up to 128"
    return ""


def attend(
    query: Float[Array, "batch length heads width"],
    key: Float[Array, "batch keys kv_heads width"],
    value: Float[Array, "batch keys kv_heads width"],
    visible: Bool[Array, "#batch length keys"] | None,
    implementation: Attention,
) -> Float[Array, "batch length heads width"]:
    """Returns softmax(q kᵀ / √width) v for every query head, whose group of heads shares a key-value head.

    Args:
      query, key, value: rotated; heads is a multiple of kv_heads.
      visible: which keys each query sees, at least one, and where there are as many keys as queries none behind itself;
        None is causal, and needs as many keys as queries.
      implementation: from `choose_attention`.
    """
    if implementation == "cudnn" and query.shape[1] % 2 == 0:
        # With a mask too: the kernel leaves out the blocks of scores that are all behind their queries.
        mask, causal = None if visible is None else visible[:, None], query.shape[1] == key.shape[1]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation="cudnn")
    batch, length, heads, width = query.shape
    if length == key.shape[1]:
        causal = jnp.tril(jnp.ones((length, length), bool))[None]
        return blockwise_attention(query, key, value, causal if visible is None else visible)
    assert visible is not None  # a cache has its own
    # b batch, t query, s key, k key-value head, g query head within its group, h feature
    query = query.reshape(batch, length, key.shape[2], -1, width) * width**-0.5
    scores = float32_dot(query, key, (((4,), (3,)), ((0, 2), (0, 2))))  # bktgs
    scores = jnp.where(visible[:, None, :, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bktgs,bskh->btkgh", weights, value).reshape(batch, length, heads, width)


def is_cudnn_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """Returns whether an operation is cuDNN's forward pass: a policy of `jax.checkpoint` that keeps what it gives.

    Its backward pass needs its output and each query's log Σ exp, which has no name that a policy could keep.
    """
    return primitive.name.startswith("dot_product_attention_fwd")
