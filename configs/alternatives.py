"""What a result is held against, as a recipe writes it: `int8`, `int4-g64-asymmetric`, `sparse`."""

ALTERNATIVE = r"^(int[2-8](-g[1-9][0-9]{0,8})?(-asymmetric)?|sparse)$"
"""Pattern of an alternative: integers of so many bits in groups of so many, or entries left out."""

ALTERNATIVE_WORDS = "an alternative such as int8, int4-g64 or sparse"
ALTERNATIVE_REMEDY = (
    "write int2 to int8, if wanted with -g64 (a scale for 64 numbers) and -asymmetric behind, or "
    "sparse"
)
