"""Collectives are read from a program's text with their kinds, groups, bytes, and as often as they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stable_lora_jax.planning import Collective, read_collectives

# ruff: noqa: E501
# The forms that the TPU compiler writes, cut down: a loop of 16 around an asynchronous gather, and one reduction after.
TPU_TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=16

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%body (state: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %state = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %w = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %start = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0}, u32[]{:S(2)}) all-gather-start(%w), channel_id=1, replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}
  %done = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather-done(%start)
  ROOT %next = (s32[], bf16[4,8]) tuple(%i, %w)
}

%condition (state: (s32[], bf16[4,8])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %n = s32[]{:T(128)} constant(16)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%overlapped (q: bf16[4,8]) -> bf16[8,8] {
  %q = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=9, replica_groups=mesh['data'=8,'fsdp'=2] {'fsdp'}, dimensions={0}
}

%overlapped.1 (q: bf16[4,8]) -> bf16[8,8] {
  %q = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.1 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=9, replica_groups=mesh['data'=8,'fsdp'=2] {'fsdp'}, dimensions={0}
}

ENTRY %main (p: bf16[4,8]) -> f32[2,3] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %while = (s32[], bf16[4,8]) while(%init), condition=%condition, body=%body
  %fused = bf16[8,8]{1,0:T(8,128)(2,1)} fusion(%p), kind=kOutput, calls=%overlapped
  %fused.1 = bf16[8,8]{1,0:T(8,128)(2,1)} fusion(%p), kind=kOutput, calls=%overlapped.1
  %moved = f32[5]{0:T(128)} collective-permute(%v), channel_id=3, source_target_pairs={{2,6},{6,2}}
  ROOT %all = f32[2,3]{1,0:T(8,128)} all-reduce(%g), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""


def test_the_compilers_forms():
    gather, overlapped, permute, reduce = read_collectives(TPU_TEXT, 16)
    assert gather == Collective("all-gather", (0, 4, 8, 12), 16, 16 * 8 * 2, True)
    assert overlapped == Collective("all-gather", (0, 1), 1, 128, False)  # written twice, run once
    assert permute == Collective("collective-permute", (2, 6), 1, 20, False)
    assert reduce == Collective("all-reduce", (0, 1, 2, 3), 1, 24, False)
    assert gather.received_bytes == 16 * 256 * 3 / 4  # a quarter was there already
    assert reduce.received_bytes == 24 * 2 * 3 / 4  # a reduce-scatter and an all-gather


@pytest.mark.parametrize("length", [1, 5])
def test_a_real_program(eight_devices, length):
    """A loop that gathers one row-split matrix of a stack each time, then sums over the devices once."""
    mesh = Mesh(np.array(eight_devices), ("x",))

    def sharded(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    def program(x, stack):
        def body(x, w):
            whole = jax.lax.with_sharding_constraint(w, sharded())
            return jnp.tanh(x @ whole), None

        x, _ = jax.lax.scan(body, x, stack)
        return x.sum()

    shapes = jax.ShapeDtypeStruct((16, 32), jnp.float32), jax.ShapeDtypeStruct((length, 32, 32), jnp.float32)
    shardings = sharded("x"), sharded(None, "x")
    compiled = jax.jit(program, in_shardings=shardings, out_shardings=sharded()).lower(*shapes).compile()
    found = read_collectives(compiled.as_text(), 8)
    assert [(each.kind, each.runs, each.result_bytes, each.in_loop) for each in found] == [
        ("all-gather", length, 32 * 32 * 4, length > 1),
        ("all-reduce", 1, 4, False),
    ]
    assert all(each.group == tuple(range(8)) for each in found)
