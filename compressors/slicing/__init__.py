"""Methods that leave a smaller dense model: fewer layers, narrower ones, or fewer channels."""

from lrc.compressors.slicing.drop import Drop
from lrc.compressors.slicing.modegpt import Modegpt
from lrc.compressors.slicing.slice_method import SliceMethod
from lrc.compressors.slicing.slicegpt import Slicegpt

METHODS: dict[str, SliceMethod] = {
    "drop": Drop(),
    "modegpt": Modegpt(),
    "slicegpt": Slicegpt(),
}
"""Name in a recipe -> the method; a method is a row."""

__all__ = ["METHODS", "SliceMethod"]
