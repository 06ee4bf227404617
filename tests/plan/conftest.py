"""Datasets and a checkpoint of configs and tokenizer alone: a plan reads no weights."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from vidgen.config import JobConfig
from vidgen.plan.build import PlanResult, build
from vidgen.plan.files import part_table, read_items, rejected_table
from vidgen.store.objects import Objects
from vidgen.types import Item

Planner = Callable[..., PlanResult]
TEXT_TOKENS = 16


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Where `dataset` writes."""
    return tmp_path / "prompts.parquet"


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects(str(tmp_path / "output"))


def dataset(path: Path, columns: dict[str, Any], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)


def job(source: Path, **rooms: dict[str, Any]) -> JobConfig:
    """A test card of `source`, with these rooms of the configuration on top; built directly, which is quicker than
    through OmegaConf and checks nothing."""
    base: dict[str, dict[str, Any]] = {"model": {"family": "testcard"}, "dataset": {"path": str(source)}}
    hints = get_type_hints(JobConfig)
    return JobConfig(**{name: hints[name](**{**base.get(name, {}), **rooms.get(name, {})}) for name in {*base, *rooms}})


def items_of(objects: Objects, result: PlanResult) -> list[Item]:
    return [item for plan in result.plans for part in plan.parts for item in read_items(objects, plan, part)]


def rejections(objects: Objects, result: PlanResult) -> list[dict[str, Any]]:
    return [row for plan in result.plans for part in plan.rejected for row in rejected_table(objects, part).to_pylist()]


def rows_of(objects: Objects, result: PlanResult) -> list[dict[str, Any]]:
    return [row for plan in result.plans for part in plan.parts for row in part_table(objects, part).to_pylist()]


def planned(tmp_path: Path, columns: dict[str, Any], name: str = "run", **rooms: dict[str, Any]) -> list[Item]:
    """The items of a dataset of these columns."""
    source, objects = tmp_path / f"{name}.parquet", Objects(f"memory://plan-tests/{uuid.uuid4()}")
    dataset(source, columns)
    return items_of(objects, build(job(source, **rooms), objects))


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    """A Wan checkpoint's configs; its tokenizer has a token a letter, and prompts may have TEXT_TOKENS."""
    folder = tmp_path / "wan"
    transformer = {
        "patch_size": [1, 2, 2],
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "text_dim": 8,
        "freq_dim": 8,
        "ffn_dim": 16,
        "num_layers": 1,
        "cross_attn_norm": True,
        "eps": 1e-6,
        "rope_max_seq_len": 64,
        "qk_norm": "rms_norm_across_heads",
    }
    vae = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [True, True],
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
    }
    text = {
        "model_type": "umt5",
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 16,
        "num_heads": 2,
        "num_layers": 1,
        "vocab_size": 64,
        "relative_attention_num_buckets": 8,
    }
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        "prediction_type": "flow_prediction",
    }
    index = {
        "_class_name": "WanPipeline",
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    }
    defaults = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 20, "negative_prompt": "bad"}
    written = {
        "model_index.json": index,
        "transformer/config.json": transformer,
        "vae/config.json": vae,
        "text_encoder/config.json": text,
        "scheduler/scheduler_config.json": scheduler,
        "tokenizer/tokenizer_config.json": {},
        "vidgen.json": {"max_text_tokens": TEXT_TOKENS, "defaults": defaults},
    }
    for name, value in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    letters = {chr(code): code - 32 for code in range(33, 127)} | {"▁": 0, "</s>": 95, "<unk>": 96}
    tokenizer = tokenizers.Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 95)])
    tokenizer.save(str(folder / "tokenizer/tokenizer.json"))
    return folder
