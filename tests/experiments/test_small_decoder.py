"""One seed has a table of its own, and no run adds lines to those of other settings."""

import pytest

from experiments.studies import small_decoder


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
