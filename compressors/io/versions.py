"""Versions of the packages that a result depends on."""

from importlib import metadata


def versions() -> dict[str, str]:
    """Return the installed versions by package."""
    names = ["torch", "transformers", "safetensors", "accelerate", "datasets", "lm_eval"]
    return {"lrc": metadata.version("lrc-compress")} | {n: metadata.version(n) for n in names}
