"""Data: real questions and your own, as token numbers and as batches of NumPy arrays. It knows no model."""

from stable_lora_jax.data.assets import cache_dir, qa_wheel, smollm2_gguf
from stable_lora_jax.data.batches import (
    Batch,
    BatchesByStep,
    BatchRows,
    TrainBatches,
    bucket,
    eval_batches,
    make_batch,
    pad_batch,
    prefetch,
)
from stable_lora_jax.data.jsonl import Completion, load_jsonl
from stable_lora_jax.data.prompts import (
    PROMPT_FORMATS,
    Encoded,
    check_fits,
    digest,
    encode_all,
    format_question,
    right_branch_only,
)
from stable_lora_jax.data.tasks import TASKS, Question, hold_out, load_task
from stable_lora_jax.data.tokenizer import SMOLLM2, load_tokenizer

__all__ = [
    "PROMPT_FORMATS",
    "SMOLLM2",
    "TASKS",
    "Batch",
    "BatchRows",
    "BatchesByStep",
    "Completion",
    "Encoded",
    "Question",
    "TrainBatches",
    "bucket",
    "cache_dir",
    "check_fits",
    "digest",
    "encode_all",
    "eval_batches",
    "format_question",
    "hold_out",
    "load_jsonl",
    "load_task",
    "load_tokenizer",
    "make_batch",
    "pad_batch",
    "prefetch",
    "qa_wheel",
    "right_branch_only",
    "smollm2_gguf",
]
