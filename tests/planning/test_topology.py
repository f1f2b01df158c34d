"""Slices: their names, their sizes, and the links that a group of chips shares."""

import pytest

from stable_lora_jax.planning import CHIPS, parse_topology


@pytest.mark.parametrize(("text", "chips"), [("v5e:4x4", 16), ("v5e:16x16", 256), ("v5p:2x2x4", 16), ("v4:4x4x4", 64)])
def test_parse(text, chips):
    topology = parse_topology(text)
    assert topology.chips == chips
    assert str(topology) == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("v9:4x4", r"'v9' is no known chip. Known are v4, v5e, v5p, v6e, h100, h200, a100; write e.g. v5e:4x4"),
        ("4x4", r"'4x4' is no known chip"),
        ("v5e", r"'v5e' is not understood at ''. A slice of v5e has 2 axes; write e.g. v5e:4x4"),
        ("v5e:2x2x2", r"not understood at '2x2x2'. A slice of v5e has 2 axes"),
        ("v5p:4x4", r"A slice of v5p has 3 axes; write e.g. v5p:4x4x4"),
        ("v5e:0x4", r"not understood at '0x4'"),
        ("v5e:4x4 ", r"not understood at '4x4 '"),
    ],
)
def test_errors(text, told):
    with pytest.raises(ValueError, match=told):
        parse_topology(text)


def test_gpus_of_a_host():
    topology = parse_topology("h100:8")
    assert (topology.chips, topology.chip.is_gpu, str(topology)) == (8, True, "h100:8")
    assert topology.group_rate((0,)) == 900e9 / 2  # by the switch, whatever the group
    with pytest.raises(ValueError, match=r"Plans for GPUs are of one host: write e.g. a100:1 to a100:8"):
        parse_topology("a100:9")


def test_links_of_a_group():
    # v5e: 50 GB/s a link and direction. An axis of 4 is a line, whose end has one neighbour; one of 16 is a ring.
    assert parse_topology("v5e:4x4").group_rate((0,)) == 50e9
    assert parse_topology("v5e:4x4").group_rate((0, 1)) == 100e9
    assert parse_topology("v5e:16x16").group_rate((0, 1)) == 200e9
    # A chip inside a whole v5p cube uses all six ports, which the documentation puts at 1200 GB/s in both directions.
    assert parse_topology("v5p:4x4x4").group_rate((0, 1, 2)) == 1200e9 / 2
    assert parse_topology("v5p:2x2x4").axes_for(4) == (2,)
    assert parse_topology("v5p:2x2x4").axes_for(8) == (0, 1, 2)


def test_every_chip_has_figures_of_the_right_size():
    for chip in CHIPS.values():
        assert 16 * 2**30 <= chip.hbm <= 141 * 10**9
        assert 100e12 < chip.flops < 1e15
        assert 100 < chip.flops / chip.hbm_rate < 1000  # FLOPs a byte where compute and memory take equally long
