"""One seed has a table of its own, and no run adds lines to those of other settings."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.studies import small_decoder, small_decoder_tables


def test_one_seed_and_then_another_number_of_them(tmp_path, capsys):
    few = {"settings": ("few",), "scales": (16.0,), "rates": (1e-3, 2e-3), "variants": ("AdamW", "λ = 0.02")}
    config = {**few, "steps": 10, "pretraining": 2, "results": tmp_path}
    small_decoder.main(small_decoder.SmallDecoderConfig(**config, seeds=1))
    told = capsys.readouterr().out
    assert "10 steps, 1 seed\n" in told
    assert "(one seed)" in told
    before = (tmp_path / "small_decoder.jsonl").read_text()
    for other in ({"seeds": 2}, {"seeds": 1, "steps": 20}, {"seeds": 1, "pretraining": 3}):
        with pytest.raises(ValueError, match="Give another folder: --results"):
            small_decoder.main(small_decoder.SmallDecoderConfig(**{**config, **other}))
    assert (tmp_path / "small_decoder.jsonl").read_text() == before


def test_lines_of_a_folder_share_one_base(tmp_path):
    config = {"settings": ("few",), "scales": (16.0,), "rates": (1e-3,), "steps": 10, "pretraining": 2, "seeds": 1}
    for way in ("AdamW", "λ = 0.02"):
        small_decoder.main(small_decoder.SmallDecoderConfig(**config, results=tmp_path, variants=(way,)))
    first, second = (json.loads(line) for line in (tmp_path / "small_decoder.jsonl").read_text().splitlines())
    assert first["base"] == second["base"]
    base, checksum = small_decoder.base_in(tmp_path, 2)
    assert checksum == first["base"]
    trained = nnx.split(small_decoder.pretrained(2))[1]
    for one, other in zip(jax.tree.leaves(nnx.split(base)[1]), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(one, other)
    # With another base, as of another machine, nothing is added.
    (tmp_path / "small_decoder-base-2.npz").unlink()
    np.savez(tmp_path / "small_decoder-base-2.npz", *(np.asarray(x) + 1 for x in jax.tree.leaves(trained)))
    with pytest.raises(ValueError, match="Give another folder: --results"):
        small_decoder.main(small_decoder.SmallDecoderConfig(**config, results=tmp_path, variants=("A₀ × 1/4",)))


def test_ways_of_different_grids_keep_their_own_rates():
    def line(way, rates, nats):
        told = np.full((len(rates), 2, 10, 2), np.array(nats)[:, None, None, None]).tolist()
        return {"setting": "few", "scale": 16.0, "steps": 200, "way": way, "rates": rates, "nats": told}

    lines = [line("AdamW", [0.004, 0.002, 0.008], [2.0, 2.3, 2.5]), line("drift", [0.004, 0.002], [2.2, 2.1])]
    lines.append(line("drift", [0.001], [1.9]))  # a grid that was extended
    (setting,) = small_decoder_tables.by_setting(lines)
    assert setting.rates == {"AdamW": [0.002, 0.004, 0.008], "drift": [0.001, 0.002, 0.004]}
    assert {way: setting.rates[way][setting.best[way]] for way in setting.rates} == {"AdamW": 0.004, "drift": 0.001}
    np.testing.assert_allclose(setting.over_rates["AdamW"], (2.3 + 2.0) / 2)
    np.testing.assert_allclose(setting.over_rates["drift"], (2.1 + 2.2) / 2)
    assert small_decoder_tables.chosen(setting, "AdamW") == "0.004"
    assert small_decoder_tables.chosen(setting, "drift") == "0.001 (edge)"
