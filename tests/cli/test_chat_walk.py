"""What docs/use/chat.md says, line for line, with a tiny Qwen3 and its own template, up to the answer when served."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "use" / "chat.md").read_text()
CONVERSATIONS, YAML, TRAINING, RESULT, SERVING = re.findall(r"^```\w*\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    """Returns the commands of a block, without their comments, and without pip's."""
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [words[1:] for words in lines if words and words[0] == "stable-lora"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a tiny Qwen3, its tokenizer with Qwen3's template, conversations and the page's run.yaml."""
    torch, trl = pytest.importorskip("torch"), pytest.importorskip("trl")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("walk")
    base = folder / "Tiny-Qwen3"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(base)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=special
    )
    whole.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    whole.save_pretrained(base)
    sums = [
        [{"role": "user", "content": f"{i}+{j}?"}, {"role": "assistant", "content": str(i + j)}]
        for i in range(12)
        for j in range(10)
    ]
    (folder / "chat.jsonl").write_text(
        CONVERSATIONS + "".join(json.dumps({"messages": messages}) + "\n" for messages in sums)
    )
    (folder / "run.yaml").write_text(YAML.replace("model: smollm2-135m", "model: Tiny-Qwen3"))
    (folder / "questions.txt").write_text("1+1?\n2+2?\n")
    return folder


@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT about themselves
def test_a_newcomer_trains_asks_and_serves(folder):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "stable_lora_jax.cli", *arguments]
        python_path = str(Path(__file__).parents[2])
        environment = os.environ | {"PYTHONPATH": python_path}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    train, watch = commands(TRAINING)
    assert "Trained" in run(*train)
    assert "validation" in run(*watch, "--once")
    ask, ask_several, export, export_merged = commands(RESULT)
    answer = run(*ask)
    assert len(run(*ask_several).strip().splitlines()) >= 2
    run(*export), run(*export_merged)
    # Served: by PEFT on the base, and the merged model by transformers alone.
    names = re.findall(r"--lora-modules \w+=(\S+)|vllm serve \./(\S+)", SERVING)
    adapter, merged = names[0][0], names[1][1]
    tokenizer = AutoTokenizer.from_pretrained(folder / merged)
    base = AutoModelForCausalLM.from_pretrained(folder / "Tiny-Qwen3", dtype=torch.float32)
    served = [
        peft.PeftModel.from_pretrained(base, folder / adapter),
        AutoModelForCausalLM.from_pretrained(folder / merged, dtype=torch.float32),
    ]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": ask[ask.index("--prompt") + 1]}], add_generation_prompt=True, return_tensors="pt"
    )
    prompt = prompt if isinstance(prompt, torch.Tensor) else prompt["input_ids"]
    for model in served:
        with torch.no_grad():
            tokens = model.generate(input_ids=prompt, max_new_tokens=32, do_sample=False, pad_token_id=0)
        theirs = tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
        assert theirs.strip()
        assert answer.strip().startswith(theirs.strip()[:20])
