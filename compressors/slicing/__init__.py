"""Slicing methods: remove layers, experts, dimensions of the residual stream, or channels."""

from typing import Any

from lrc.compressors.slicing.drop import Drop
from lrc.compressors.slicing.modegpt import Modegpt
from lrc.compressors.slicing.ream import Ream
from lrc.compressors.slicing.reap import Reap
from lrc.compressors.slicing.slice_method import SliceMethod
from lrc.compressors.slicing.slicegpt import Slicegpt

METHODS: dict[str, SliceMethod[Any]] = {
    "drop": Drop(),
    "modegpt": Modegpt(),
    "slicegpt": Slicegpt(),
    "reap": Reap(),
    "ream": Ream(),
}
"""Slicing method by its name in a recipe. To add a method, add a row."""

__all__ = ["METHODS", "SliceMethod"]
