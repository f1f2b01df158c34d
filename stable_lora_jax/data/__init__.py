"""Data: real questions and your own, as token numbers and as batches of NumPy arrays. It knows no model."""

from stable_lora_jax.extras import needs

with needs("train"):
    from stable_lora_jax.assets.packaged import cache_dir, qa_wheel, smollm2_gguf
    from stable_lora_jax.data.batches import (
        Batch,
        BatchesByStep,
        BatchRows,
        TrainBatches,
        bucket,
        eval_batches,
        make_batch,
        make_rows,
        pad_batch,
        prefetch,
    )
    from stable_lora_jax.data.chat import ChatTemplateError, has_chat_template, render_chat
    from stable_lora_jax.data.encoding import Encoded, check_fits, digest, encode_all, right_branch_only
    from stable_lora_jax.data.jsonl import Completion, load_jsonl
    from stable_lora_jax.data.packing import PackedBatches
    from stable_lora_jax.data.prompts import PROMPT_FORMATS, format_question
    from stable_lora_jax.data.tasks import TASKS, Question, hold_out, load_task
    from stable_lora_jax.data.tokenizer import SMOLLM2, load_tokenizer

__all__ = [
    "PROMPT_FORMATS",
    "SMOLLM2",
    "TASKS",
    "Batch",
    "BatchRows",
    "BatchesByStep",
    "ChatTemplateError",
    "Completion",
    "Encoded",
    "PackedBatches",
    "Question",
    "TrainBatches",
    "bucket",
    "cache_dir",
    "check_fits",
    "digest",
    "encode_all",
    "eval_batches",
    "format_question",
    "has_chat_template",
    "hold_out",
    "load_jsonl",
    "load_task",
    "load_tokenizer",
    "make_batch",
    "make_rows",
    "pad_batch",
    "prefetch",
    "qa_wheel",
    "render_chat",
    "right_branch_only",
    "smollm2_gguf",
]
