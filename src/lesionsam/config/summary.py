"""A configuration in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lesionsam.config.load import config_digest, to_values
from lesionsam.config.schema import Config


def trained_parts(model: Mapping[str, Any]) -> str:
    """Return what a section `model` (plain values) trains, in words."""
    last = next((value for key, value in model.items() if key.endswith("last_k")), 0)
    where = f"the last {last} encoder blocks" if last else "the whole encoder"
    words = {
        "none": [],
        "blocks": [where],
        "adapter": [f"adapters of {model.get('adapter_dim')} units of {where}"],
        "lora": [f"low-rank updates (rank {model.get('lora_rank')}) of {where}"],
    }[model["encoder"]]
    switches = (("the decoder", "train_decoder"), ("the prompt encoder", "train_prompt_encoder"))
    return ", ".join([*words, *(name for name, key in switches if model[key])])


def summary(config: Config) -> list[str]:
    """Return the configuration in a few lines."""
    data, boxes, model, method, train = config.data, config.boxes, config.model, config.method, config.train
    size = f", side {model.image_size} px" if model.image_size else ""
    counts = {
        "synthetic": ("num_train", "num_dev", "num_test"),
        "folder": ("dev_fraction", "test_split"),
        "coco": ("annotations", "test_split"),
    }
    named = ", ".join(f"{key} {getattr(data, key)}" for key in counts.get(data.source, ("subset", "dev_fraction")))
    trained = trained_parts(to_values(config)["model"])
    target = f", target {method.target.kind}" if method.name == "contrastive" else ""
    return [
        f"data     {data.source} ({named})",
        f"boxes    {boxes.source}",
        f"model    {model.name} from {model.checkpoint}{size}; trained: {trained}",
        f"method   {method.name}{target}",
        f"train    {train.epochs} epochs, {train.batch_size} x {train.accumulate} images a step, {train.precision}",
        f"digest   {config_digest(config)[:12]}",
    ]
