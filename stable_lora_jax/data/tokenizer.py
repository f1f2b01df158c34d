"""Tokenizers from the Hugging Face hub, from a folder, or from the lists inside a GGUF file, all with one interface.

Deviation: `transformers` reads GGUF tokenizers only where torch is installed, and (5.23) ignores the splitting rule
`smollm`, so it joins the last space of a run to a following digit and keeps numerals such as "²" glued to a space.
Here the rule is applied: digits one by one first, then byte-level BPE. On the text of the five tasks both agree
(`tests/data/test_tokenizer.py`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_lora_jax.assets.gguf_metadata import read_gguf_metadata
from stable_lora_jax.assets.packaged import smollm2_gguf

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"
_MODELS = ("gpt2",)
_SPLITS = ("smollm",)
_CONTROL, _USER_DEFINED = 3, 4


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Returns a `transformers` tokenizer: `encode`, `decode`, `apply_chat_template`, `eos_token_id` and the rest.

    Args:
      name_or_path: `smollm2-135m` (the model that needs no hub), a `.gguf` file with a byte-level BPE, a folder
        with a Hugging Face tokenizer, or a hub name.

    Raises:
      ValueError: the GGUF's tokenizer is of a kind that is not supported, or the name is neither a folder nor one
        that a hub could know.
      FileNotFoundError: no such GGUF file.
      OSError: a folder without a tokenizer, or a hub name that gave none.
    """
    if name_or_path == SMOLLM2:
        return _from_gguf(smollm2_gguf())
    path = Path(name_or_path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(
                f"no GGUF file {path}; give the path of an existing file, or the name {SMOLLM2!r}, which needs none."
            )
        return _from_gguf(path)
    if not path.is_dir() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name_or_path)):
        raise ValueError(
            f"no tokenizer {str(name_or_path)!r}: allowed are {SMOLLM2!r}, an existing .gguf file, an existing folder "
            "with tokenizer files, or a hub name 'owner/model'. Correct the name or path."
        )
    return _from_hub(str(name_or_path))


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        # Code that comes with a tokenizer is never run: without this, transformers asks on the terminal.
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the tokenizer {name!r} comes with Python code of its own, which is not run here. Save it once as a "
                "fast tokenizer (tokenizer.json) in an environment that you trust it in, and give that folder."
            ) from error
        raise OSError(
            f"no tokenizer {name!r}: {str(error).strip().splitlines()[0]} Allowed are a folder with tokenizer files, "
            f"a hub name, a .gguf file, or {SMOLLM2!r}. Check the spelling; offline, use {SMOLLM2!r} or a folder."
        ) from error


def _from_gguf(path: Path) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    metadata = read_gguf_metadata(path)
    split = _split(metadata, path)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    kinds: list[int] = metadata["tokenizer.ggml.token_type"]

    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    # Both are matched whole in a text; only control tokens are left out by `decode(skip_special_tokens=True)`.
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL])
    user_defined = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined])

    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{short}_token": metadata.get(f"tokenizer.ggml.{long}_token_id") for short, long in named.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", False),
        model_max_length=metadata.get(f"{metadata['general.architecture']}.context_length"),
        clean_up_tokenization_spaces=False,
        **{name: tokens[i] for name, i in ids.items() if i is not None},
    )


def _split(metadata: dict[str, Any], path: Path) -> PreTokenizer:
    """Returns how text is cut before the merges, from the file's `pre`."""
    from tokenizers import pre_tokenizers

    for key, allowed in (("tokenizer.ggml.model", _MODELS), ("tokenizer.ggml.pre", _SPLITS)):
        if metadata.get(key) not in allowed:
            raise ValueError(
                f"{path} says {key} = {metadata.get(key)!r}; supported: {', '.join(allowed)}. "
                "Load the tokenizer of this model from its hub name or from a Hugging Face folder instead."
            )
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
