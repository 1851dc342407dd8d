"""Tiny random models that read images and text, with processors and inputs for one image."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Processor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

TEXT = {
    "vocab_size": 520,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
IMAGE_TOKEN, PLACES = 512, 4
"""Token that stands for a part of an image, and how many an image has."""
SIZE = {"longest_edge": 32}


@dataclass(frozen=True)
class ImageModel:
    """A model type, the parts of its config, and what reads images for it."""

    model_type: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    whole: Mapping[str, Any]
    reader: Callable[[PreTrainedTokenizerFast], Any]
    """Makes a processor of images and text, or of images alone."""
    unchanged: set[str]
    """Parts that `lrc plan` names as unchanged."""

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
        """Save a random model in bfloat16 with tokenizer and processor; return the processor."""
        config = AutoConfig.for_model(
            self.model_type,
            text_config={**TEXT, **self.text},
            vision_config={**VISION, **self.vision},
            **self.whole,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        reader = self.reader(tokenizer)
        reader.save_pretrained(folder)
        return reader


def _gemma3(tokenizer: PreTrainedTokenizerFast) -> Any:
    named = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<begin>",
            "eoi_token": "<end>",
        },
    )
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return Gemma3Processor(images, named, image_seq_length=PLACES)


def _idefics3(tokenizer: PreTrainedTokenizerFast) -> Any:
    images = Idefics3ImageProcessorPil(size=SIZE, max_image_size=SIZE)
    return Idefics3Processor(images, tokenizer, image_seq_len=PLACES)


IDEFICS = {
    "text": {"model_type": "llama", "head_dim": 8},
    "vision": {"image_size": 32, "patch_size": 8},
    "unchanged": {"model.vision_model", "model.connector"},
}
IMAGE_MODELS = {
    "gemma3": ImageModel(
        "gemma3",
        {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        {"image_size": 28, "patch_size": 7},
        {
            "mm_tokens_per_image": PLACES,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 513,
            "eoi_token_index": 514,
        },
        _gemma3,
        {"model.vision_tower", "model.multi_modal_projector"},
    ),
    "qwen2.5-vl": ImageModel(
        "qwen2_5_vl",
        {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [1]},
        {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": 514, "vision_end_token_id": 515},
        lambda _: Qwen2VLImageProcessorPil(min_pixels=56**2, max_pixels=56**2),
        {"model.visual"},
    ),
    "idefics3": ImageModel(
        "idefics3",
        whole={"image_token_id": 513, "scale_factor": 2},
        reader=_idefics3,
        **IDEFICS,
    ),
    "smolvlm": ImageModel(
        "smolvlm",
        whole={"image_token_id": IMAGE_TOKEN, "scale_factor": 2},
        reader=lambda _: SmolVLMImageProcessorPil(size=SIZE, max_image_size=SIZE),
        **IDEFICS,
    ),
}


def read_image(reader: Any) -> dict[str, torch.Tensor]:
    """Return the inputs of a model for a random image and some text.

    Without a processor of text, the tokens are written by hand.
    """
    pixels = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if hasattr(reader, "tokenizer"):
        start = getattr(reader, "boi_token", "<image>")
        return dict(reader(images=[image], text=[f"{start} A compiler"], return_tensors="pt"))
    inputs = dict(reader(images=[image], return_tensors="pt"))
    ids = torch.tensor([[0, 34, *[IMAGE_TOKEN] * PLACES, 45, 56]])
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    return inputs
