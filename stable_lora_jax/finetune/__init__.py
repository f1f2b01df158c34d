"""The job library: what `stable-lora train` runs, to be called from Python too.

>>> from stable_lora_jax.finetune import RunConfig, finetune
>>> config = RunConfig.of(data="arc_easy", lam=0.001, steps=20)  # result = finetune(config)
"""

from stable_lora_jax.extras import needs

with needs("train"):
    from stable_lora_jax.finetune.config import (
        DTYPES,
        AdapterConfig,
        DataConfig,
        MethodConfig,
        ModelConfig,
        RunConfig,
        ScheduleConfig,
        check_choice,
        check_data,
        fingerprint,
        numbers_of,
        option_places,
        options_of,
    )
    from stable_lora_jax.finetune.execution import ExecutionConfig, parse_mesh
    from stable_lora_jax.finetune.loading import (
        HUB_NAMES,
        adapter_file,
        base_of,
        given_or_trained,
        inject_adapters,
        load_base,
        load_with_adapter,
        quantization,
        record_of,
    )
    from stable_lora_jax.finetune.run import (
        finetune,
        load_training_examples,
        load_validation,
        total_steps,
        training_batches,
        training_items,
        update_rule,
    )

__all__ = [
    "DTYPES",
    "HUB_NAMES",
    "AdapterConfig",
    "DataConfig",
    "ExecutionConfig",
    "MethodConfig",
    "ModelConfig",
    "RunConfig",
    "ScheduleConfig",
    "adapter_file",
    "base_of",
    "check_choice",
    "check_data",
    "finetune",
    "fingerprint",
    "given_or_trained",
    "inject_adapters",
    "load_base",
    "load_training_examples",
    "load_validation",
    "load_with_adapter",
    "numbers_of",
    "option_places",
    "options_of",
    "parse_mesh",
    "quantization",
    "record_of",
    "total_steps",
    "training_batches",
    "training_items",
    "update_rule",
]
