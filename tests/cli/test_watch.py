"""`stable-lora watch` shows what metrics.jsonl says, in the terminal and on a page that a real browser opens."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from stable_lora_jax.cli import main
from stable_lora_jax.training import read_metrics, stop_steps


@pytest.fixture(scope="module")
def watched(model_dir, data_file, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "watched <run>"
    command = ["train", "--model", model_dir, "--data", data_file, "--rank", 2, "--steps", 12, "--run-dir", run]
    assert main([str(x) for x in [*command, "--learning-rate", "3e-2", "--lam", 0.3, "--batch-size", 4]]) == 0
    return run


def test_terminal_and_page(watched, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    page = tmp_path / "page.html"
    assert main(["watch", str(watched), "--html", str(page)]) == 0  # ends by itself: the run is finished
    told, written = capsys.readouterr().out, page.read_text()
    lines = read_metrics(watched / "metrics.jsonl")
    stops = stop_steps(lines)
    assert stops
    last = [line["norms"] for line in lines if "norms" in line][-1]
    assert "step 12/12" in told
    for pair, values in last.items():
        row = next(line for line in told.splitlines() if pair in line)
        assert f"{np.median(values['norm_a']):.4g}" in row
        assert f"{len(stops.get(pair, {}))}/3" in row
        if pair in stops:
            steps = sorted(stops[pair].values())
            assert f"<td>{pair}</td><td>{len(steps)}</td><td>{steps[0]}</td>" in written
    assert "http-equiv" not in written  # nothing more will come
    assert not re.search(r"(src|href)=\"http|<script", written)


def test_a_running_run(watched, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    assert main(["watch", str(run), "--once"]) == 0
    assert "has no step yet" in capsys.readouterr().out
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(watched / name, run)
    assert main(["watch", str(run), "--once", "--html", str(tmp_path / "page.html")]) == 0
    # A run that went on after its metrics were lost has no norms until the next are due.
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "norms" not in line]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["watch", str(run), "--once", "--html", str(tmp_path / "later.html")]) == 0
    assert "step 12/12" in capsys.readouterr().out
    assert not (tmp_path / "later.html").exists()
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert "no run directory" in capsys.readouterr().err


def test_several_runs_are_compared(watched, model_dir, data_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    other = tmp_path / "other"
    command = ["train", "--model", model_dir, "--data", data_file, "--rank", 2, "--steps", 4, "--run-dir", other]
    command += ["--method", "adamw", "--batch-size", 4, "--holdout", 3, "--eval-every", 2, "--keep-best"]
    assert main([str(x) for x in command]) == 0
    (tmp_path / "empty").mkdir()
    runs = [str(watched), str(other), str(tmp_path / "empty")]
    assert main(["watch", *runs, "--once", "--html", str(tmp_path / "no.html")]) == 0
    told = capsys.readouterr().out
    rows = {name: next(line for line in told.splitlines() if line.startswith(name)) for name in ("watched", "other")}
    assert "12/12" in rows["watched"]
    lines = [line for line in read_metrics(other / "metrics.jsonl") if "validation" in line]
    best = min(lines, key=lambda line: line["validation"]["loss"])
    assert [line["step"] for line in lines] == [2, 4]
    assert f"{best['validation']['loss']:.4f}" in rows["other"]
    assert not (tmp_path / "no.html").exists()  # one of them has nothing to show yet
    assert main(["watch", *runs[:2], "--once", "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 3
    assert "<h1>other</h1>" in page
    assert f"lowest {best['validation']['loss']:.4f} at step {best['step']}" in page
    capsys.readouterr()
    assert main(["watch", str(other), "--once"]) == 0
    assert f"validation {lines[-1]['validation']['loss']:.4f}, accuracy" in " ".join(capsys.readouterr().out.split())


def test_it_follows_a_run_to_its_end(watched, tmp_path, monkeypatch):
    run, file, seen = tmp_path / "run", tmp_path / "page.html", []
    run.mkdir()
    shutil.copy(watched / "config.json", run)
    lines = (watched / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[: len(lines) // 2]))

    def meanwhile(seconds):
        seen.append(file.read_text())
        if len(seen) == 1:
            (run / "metrics.jsonl").write_text("".join(lines))
        else:
            shutil.copy(watched / "adapter.safetensors", run)

    monkeypatch.setattr("stable_lora_jax.cli.watch.time.sleep", meanwhile)
    assert main(["watch", str(run), "--html", str(file)]) == 0
    assert ["Step 12 of 12" in page for page in (*seen, file.read_text())] == [False, True, True]
    assert ["http-equiv" in page for page in (*seen, file.read_text())] == [True, True, False]


@pytest.mark.parametrize("at", ["RunDirectory", "time.sleep"])
def test_an_interrupt_ends_the_watching_at_any_moment(tmp_path, monkeypatch, at):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"stable_lora_jax.cli.watch.{at}", interrupt)
    assert main(["watch", str(tmp_path)]) == 0


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_shows_the_page(watched, tmp_path):
    page = tmp_path / "page.html"
    assert main(["watch", str(watched), "--once", "--html", str(page)]) == 0
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"),
    ]
    shown = subprocess.run(
        ["chromium", *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    config = json.loads((watched / "config.json").read_text())["config"]
    assert "<h1>watched &lt;run&gt;</h1>" in shown
    assert shown.count("<svg") == 2
    assert f"<td>method</td><td>{config['method']['name']}</td>" in shown
    assert "Step 12 of 12" in shown
