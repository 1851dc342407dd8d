"""What a result is held against, as a recipe writes it: `int8`, `int4-g64-asymmetric`, `sparse`."""

from lrc.configs.quantize import SCHEME

ALTERNATIVE = rf"^({SCHEME}|sparse)$"
"""Pattern of an alternative: integers of so many bits in groups of so many, or entries left out."""

ALTERNATIVE_WORDS = "an alternative such as int8, int4-g64 or sparse"
ALTERNATIVE_REMEDY = (
    "write int2 to int8, if wanted with -g64 (a scale for 64 numbers) and -asymmetric behind, or "
    "sparse"
)
