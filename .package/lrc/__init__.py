"""Compress language models after training.

`import lrc` is all that stock `transformers` needs to load a compressed checkpoint::

    import lrc
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("runs/demo/checkpoint")
"""

from importlib import metadata
from typing import Any

from lrc._register import register_loaders

__version__ = metadata.version("lrc-compress")

register_loaders()


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is used."""
    if name == "stream_low_rank":
        from lrc.compressors.layers.streaming import stream_low_rank

        return stream_low_rank
    if name == "share_embeddings":
        from lrc.compressors.layers.shared_ends import share_embeddings

        return share_embeddings
    if name in ("LoadedDeltas", "load_delta"):
        from lrc.compressors.deltas import loaded_deltas

        return getattr(loaded_deltas, name)
    raise AttributeError(f"module 'lrc' has no attribute {name!r}")
