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
    from stable_lora_jax.data.chat import ChatTemplateError, end_of_turn, has_chat_template, render_chat
    from stable_lora_jax.data.encoding import Encoded, check_fits, digest, encode_all, right_branch_only
    from stable_lora_jax.data.hub import load_hub, parse_columns
    from stable_lora_jax.data.jsonl import Completion, Conversation, Item, load_jsonl, load_prompts
    from stable_lora_jax.data.lengths import TooLong, fit
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
    "Conversation",
    "Encoded",
    "Item",
    "PackedBatches",
    "Question",
    "TooLong",
    "TrainBatches",
    "bucket",
    "cache_dir",
    "check_fits",
    "digest",
    "encode_all",
    "end_of_turn",
    "eval_batches",
    "fit",
    "format_question",
    "has_chat_template",
    "hold_out",
    "load_hub",
    "load_jsonl",
    "load_prompts",
    "load_task",
    "load_tokenizer",
    "make_batch",
    "make_rows",
    "pad_batch",
    "parse_columns",
    "prefetch",
    "qa_wheel",
    "render_chat",
    "right_branch_only",
    "smollm2_gguf",
]
