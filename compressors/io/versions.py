"""The packages and the machine that a result depends on."""

import os
import platform
from importlib import metadata
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Return the installed versions by package."""
    names = ["torch", "transformers", "safetensors", "accelerate", "datasets", "lm_eval"]
    return {"lrc": metadata.version("lrc-compress")} | {n: metadata.version(n) for n in names}


def environment(device: str) -> dict[str, Any]:
    """Return versions, processor, threads and the name of the device."""
    on_gpu = device.startswith("cuda")
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
    }
