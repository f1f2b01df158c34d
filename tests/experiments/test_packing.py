"""The benchmark of packed rows: its peer learns the same from packed and from padded rows, and all contenders run."""

import json
import sys

import pytest

from experiments.benchmarks.bench_packing import CONTENDERS, BenchConfig, main
from experiments.benchmarks.packing_workers import examples_of, packed_row, padded_rows


@pytest.mark.filterwarnings("ignore")  # of transformers about itself
def test_the_peers_rows_give_one_loss(model_dir, data_file):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    examples = examples_of(str(data_file), str(model_dir), 64)[:8]
    losses = []
    for inputs, where, targets in (padded_rows(examples), packed_row(examples)):
        with torch.no_grad():
            logits = model.lm_head(model.model(**inputs, use_cache=False).last_hidden_state[where])
            losses.append(float(torch.nn.functional.cross_entropy(logits, targets)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_all_contenders_are_measured(model_dir, data_file, tmp_path, capsys):
    pytest.importorskip("torch")
    out = tmp_path / "packing.json"
    sizes = {"data": (str(data_file),), "model": str(model_dir), "rounds": 1, "steps": 2, "max_length": 64}
    main(BenchConfig(out=out, torch_python=sys.executable, **sizes))
    (found,) = json.loads(out.read_text())["sets"]
    assert all(found[name]["tokens_per_second"] > 0 and 0 < found[name]["useful"] <= 1 for name in CONTENDERS)
    assert found["peft packed"]["useful"] == 1
    assert "useful tokens / s" in capsys.readouterr().out
