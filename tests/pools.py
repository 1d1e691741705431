"""Models with pools of tasks for tests, and what a task gives as an ordinary adapter."""

from __future__ import annotations

from functools import partial

import torch
from models import TinyVit, seed_cpu
from models import small_vit as timm_vit
from peft import PeftModel
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from recast_peft import RecastConfig, RecastLayer, TaskPool, get_recast_model

TARGETS = ["qkv", "fc1"]
TOKENS = torch.arange(1, 9).reshape(2, 4)
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT_MODELS = {  # by PEFT's task types
    "SEQ_CLS": (BertForSequenceClassification, BertConfig(**SMALL)),
    "TOKEN_CLS": (BertForTokenClassification, BertConfig(**SMALL)),
    "QUESTION_ANS": (BertForQuestionAnswering, BertConfig(**SMALL)),
    "FEATURE_EXTRACTION": (BertModel, BertConfig(**SMALL)),
    "CAUSAL_LM": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
    ),
    "SEQ_2_SEQ_LM": (
        T5ForConditionalGeneration,
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0),
    ),
}


def text_model(task_type: str) -> nn.Module:
    seed_cpu(0)
    build, config = TEXT_MODELS[task_type]
    model = build(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
            parameter.data.mul_(10)  # the usual 0.02 would hide what a task does
    return model


small_vit = partial(timm_vit, depth=4)


def model_with_pool(tasks: int = 0, **config) -> tuple[PeftModel, TaskPool]:
    model = get_recast_model(small_vit(), RecastConfig(target_modules=TARGETS, **config), "first").eval()
    pool = TaskPool(model)
    for i in range(tasks):
        pool.add(f"task{i}", random_state(pool, i))
    return model, pool


def random_state(pool: TaskPool, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layers = {layer.module_name for layer in pool.model.modules() if isinstance(layer, RecastLayer)}
    parts = {name: part for name in layers if (part := pool.part_of(name)) is not None}
    sizes = {name: part.stop - part.start for name, part in sorted(parts.items(), key=lambda entry: entry[1].start)}
    return {
        f"base_model.model.{name}.recast_coefficients": torch.randn(1, n, generator=generator) * 0.3
        for name, n in sizes.items()
    }


def by_adapter(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What a task gives as an ordinary adapter: the reference for everything that a pool does."""
    model = get_recast_model(small_vit(), RecastConfig(target_modules=TARGETS)).eval()
    for name, module in model.get_base_model().named_modules():
        key = f"base_model.model.{name}.recast_coefficients"
        if key in state:
            module.recast_coefficients["default"].data.copy_(state[key])
    return model(x)


def tiny_pool(**options) -> TaskPool:
    seed_cpu(0)
    model = get_recast_model(TinyVit().eval(), RecastConfig(target_modules=["qkv"]), "first").eval()
    return TaskPool(model, **options)
