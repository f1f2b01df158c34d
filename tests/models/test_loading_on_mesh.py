"""Weights read straight to the devices of a mesh: the same numbers; a process reads and holds its own alone."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stable_lora_jax.models import load_model, save_huggingface
from stable_lora_jax.training import make_mesh, parameter_sharding
from tests.models import tiny

# Each of two processes loads a model of 100 MB over 8 devices, and tells what its devices hold of it, what it read of
# the file, and by how much its memory grew at most.
PROCESS = """
import resource, sys
import jax
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
import stable_lora_jax.models.huggingface as huggingface
from flax import nnx
from stable_lora_jax.models import load_model
from stable_lora_jax.training import make_mesh, parameter_sharding

read, counted = huggingface._read_tensor, [0]
def counting(*arguments):
    value = read(*arguments)
    counted[0] += value.nbytes
    return value
huggingface._read_tensor = counting
mesh = make_mesh(fsdp=8)
load_model(sys.argv[1] + "-small", sharding=parameter_sharding(mesh))  # what compiles has compiled
counted[0] = 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model = load_model(sys.argv[1], sharding=parameter_sharding(mesh))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
print("told", held, counted[0], grown)
"""
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_layers": 6}
WIDE |= {"num_heads": 8, "num_kv_heads": 8, "head_dim": 64}


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}, {"data": 8}], ids=str)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "phi3"])
def test_every_device_holds_its_part(kind, sizes, tmp_path, eight_devices):
    config = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
    config |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    model = tiny.decoder(**config, model_type="phi3" if kind == "phi3" else "llama")
    dtype = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(model, nnx.Param)))
    save_huggingface(tmp_path / "model", model)
    mesh = make_mesh(**sizes, devices=eight_devices)
    options = {"dtype": dtype, "param_dtype": dtype}
    placed = load_model(tmp_path / "model", sharding=parameter_sharding(mesh), **options)
    whole = load_model(tmp_path / "model", **options)
    both = (nnx.to_flat_state(nnx.state(model, nnx.Param)) for model in (placed, whole))
    for (path, ours), (_, expected) in zip(*both, strict=True):
        name = ".".join(map(str, path))
        assert ours.sharding == parameter_sharding(mesh)(name, ours.shape), name
        np.testing.assert_array_equal(ours[...], expected[...], err_msg=name)


def test_what_the_mesh_does_not_divide_is_refused(tmp_path, eight_devices):
    save_huggingface(tmp_path / "model", tiny.decoder(hidden_size=20, head_dim=8))
    with pytest.raises(ValueError, match="does not divide the 20 of"):
        load_model(tmp_path / "model", sharding=parameter_sharding(make_mesh(fsdp=8, devices=eight_devices)))


def test_a_process_reads_and_holds_its_own_part_alone(tmp_path):
    save_huggingface(tmp_path / "model", tiny.decoder(vocab_size=4096, **WIDE))
    save_huggingface(tmp_path / "model-small", tiny.decoder(**WIDE | {"hidden_size": 64, "intermediate_size": 64}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "model"), address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, str(i)], env=os.environ | {"XLA_FLAGS": flags}, **pipes) for i in range(2)]
    outputs = [process.communicate(timeout=300) for process in started]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(tiny.decoder(vocab_size=4096, **WIDE), nnx.Param)))
    for out, error in outputs:
        told = [line.split()[1:] for line in out.splitlines() if line.startswith("told")]
        assert told, error
        held, read, grown = map(int, told[0])
        assert held < 0.51 * size
        assert read <= 1.01 * held
        assert grown <= 1.2 * held
