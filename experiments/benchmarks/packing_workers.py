"""The contenders of `bench_packing`: our step and PEFT's, on rows that are packed or padded."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.running.provenance import versions
from stable_lora_jax.data import (
    Encoded,
    PackedBatches,
    TrainBatches,
    encode_all,
    load_jsonl,
    load_task,
    load_tokenizer,
    right_branch_only,
)

BATCH = 8


def examples_of(data: str, model: str, max_length: int) -> list[Encoded]:
    """Returns the examples of a question set or a file, the right answer alone, but for those that are too long."""
    items = load_jsonl(Path(data)) if data.endswith(".jsonl") else load_task(data, "train")
    encoded = [right_branch_only(each) for each in encode_all(load_tokenizer(model), items)]
    return [each for each in encoded if each.length <= max_length]


def measured(step: Callable[[Any], Any], batches: Sequence[Any], shapes: Iterable[Any], tokens: int, whole: int) -> Any:
    """Returns the rate of real tokens over all batches, after a step of every shape.

    Args:
      step: trains on a batch and waits for it.
      batches: to be timed.
      shapes: one batch of each shape among them.
      tokens: real ones in the batches.
      whole: all tokens in them.
    """
    start = time.perf_counter()
    for batch in shapes:
        step(batch)
    first = time.perf_counter() - start
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    seconds = time.perf_counter() - start
    return {"tokens_per_second": tokens / seconds, "useful": tokens / whole, "first_seconds": first}


def ours(data: str, model: str, packed: bool, steps: int, max_length: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from stable_lora_jax import stable_lora_shrink
    from stable_lora_jax.lora import inject_lora
    from stable_lora_jax.models import load_model
    from stable_lora_jax.training import compile_step, init_state, make_loss, make_mesh, split_model
    from stable_lora_jax.training.sharding import replicated

    options: dict[str, Any] = {"batch_size": BATCH, "seed": 0, "max_length": max_length}
    examples = examples_of(data, model, max_length)
    source = PackedBatches(examples, num_steps=steps, **options) if packed else TrainBatches(examples, **options)
    graph, adapters, frozen = split_model(inject_lora(load_model(model), 8, 16.0, "qv", rngs=nnx.Rngs(0)))
    optimizer, mesh = optax.chain(optax.adamw(5e-4), stable_lora_shrink(0.001)), make_mesh()
    step = compile_step(graph, make_loss("answer", 1), optimizer, mesh=mesh, frozen=frozen)
    state = jax.device_put(init_state(jax.tree.map(jnp.copy, adapters), optimizer), replicated(mesh))
    batches = [jax.device_put(source[number]) for number in range(steps)]

    def advance(batch: Any) -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, frozen, batch))

    shapes = {(batch.tokens.shape, batch.targets.shape): batch for batch in batches}
    tokens, whole = sum(map(source.num_tokens, range(steps))), sum(batch.tokens.size for batch in batches)
    return measured(advance, batches, shapes.values(), tokens, whole) | {"versions": versions("jax", "flax", "optax")}


def peft(data: str, model: str, packed: bool, steps: int, max_length: int) -> dict[str, Any]:
    """Hugging Face transformers, PEFT and torch.optim.AdamW; the output layer for answer tokens alone."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.trainer_pt_utils import LengthGroupedSampler

    from stable_lora_jax.data import smollm2_gguf

    torch.manual_seed(0)
    examples = examples_of(data, model, max_length)
    if model == "smollm2-135m":
        file = smollm2_gguf()
        base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    else:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    decoder, head = adapted.base_model.model.model, adapted.base_model.model.lm_head
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-4)
    lengths = [each.length for each in examples]
    order = list(LengthGroupedSampler(BATCH, lengths=lengths, generator=torch.Generator().manual_seed(0)))
    # Spread over the epoch: within 50 batches the sampler's order falls from the longest examples to the shortest.
    first = np.linspace(0, len(order) // BATCH - 1, steps).round().astype(int) * BATCH
    chosen = [[examples[i] for i in order[start : start + BATCH]] for start in first]
    batches = [(packed_row if packed else padded_rows)(batch) for batch in chosen]

    def advance(batch: Any) -> None:
        inputs, where, targets = batch
        optimizer.zero_grad()
        hidden = decoder(**inputs, use_cache=False).last_hidden_state[where]
        torch.nn.functional.cross_entropy(head(hidden), targets).backward()
        optimizer.step()

    whole = sum(inputs["input_ids"].numel() for inputs, *_ in batches)
    tokens = sum(each.length for batch in chosen for each in batch)
    found = measured(advance, batches, batches[:1], tokens, whole)
    return found | {"versions": versions("torch", "transformers", "peft")}


def padded_rows(batch: Sequence[Encoded]) -> Any:
    """Returns inputs as wide as the longest example, where answers are predicted, and these."""
    import torch

    width = max(each.length for each in batch)
    tokens, mask = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width, dtype=torch.long)
    where, targets = torch.zeros(len(batch), width, dtype=torch.bool), []
    for row, each in enumerate(batch):
        inputs, places, answers = _sequence(each)
        tokens[row, : len(inputs)], mask[row, : len(inputs)] = torch.tensor(inputs), 1
        where[row, places] = True
        targets += answers
    return {"input_ids": tokens, "attention_mask": mask}, where, torch.tensor(targets)


def packed_row(batch: Sequence[Encoded]) -> Any:
    """Returns one row of all examples, whose positions begin anew with each."""
    import torch

    tokens, positions, where, targets = [], [], [], []
    for each in batch:
        inputs, places, answers = _sequence(each)
        where += [len(tokens) + place for place in places]
        tokens += inputs
        positions += range(len(inputs))
        targets += answers
    chosen = torch.zeros(1, len(tokens), dtype=torch.bool)
    chosen[0, where] = True
    inputs = {"input_ids": torch.tensor([tokens]), "position_ids": torch.tensor([positions])}
    return inputs, chosen, torch.tensor(targets)


def _sequence(example: Encoded) -> tuple[list[int], list[int], list[int]]:
    """Returns an example's input tokens, where its learnt tokens are predicted, and these."""
    (branch,), prefix = example.branches, list(example.prefix)
    learnt = example.learnt or (True,) * len(branch)
    places = [len(prefix) - 1 + number for number, used in enumerate(learnt) if used]
    return [*prefix, *branch[:-1]], places, [token for token, used in zip(branch, learnt, strict=True) if used]
