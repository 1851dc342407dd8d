"""PTX that takes 16-bit values out of words, one for each bit of a mask.

A value takes four instructions, none of which accesses memory. Written with selections, the same
steps compile to twice as many. The operands are five words, the mask, and the number of bits before
the first value.
"""


def _shift_out(take: list[str], registers: str, first: int, before: str, after: str = "") -> str:
    """Return PTX that does ``take[k]`` under predicate p, for values in the lower half of v0.

    The operands start at number `first`. After column k at most 7 - k values are left in v0 to v3,
    so that fewer words have to move.
    """
    lines = [f".reg .pred p; .reg .b32 v0, v1, v2, v3, t; {registers}"]
    for i in range(4):
        lines.append(f"shf.r.wrap.b32 v{i}, ${first + i}, ${first + i + 1}, ${first + 6};")
    lines.append(before)
    for k in range(8):
        lines.append(f"and.b32 t, ${first + 5}, {1 << k}; setp.ne.b32 p, t, 0;")
        lines.append(take[k])
        words = (8 - k) // 2
        for i in range(words):
            if i + 1 < words or k % 2 == 1:  # the next word holds values that are left
                lines.append(f"@p prmt.b32 v{i}, v{i}, v{i + 1}, 0x5432;")
            else:
                lines.append(f"@p shr.u32 v{i}, v{i}, 16;")
    return "{\n" + "\n".join([*lines, after]) + "\n}"


def _insert(k: int) -> str:
    """Return PTX that makes the lower half of v0 entry k of eight in four words."""
    selector = "0x5410" if k % 2 else "0x3254"
    return f"@p prmt.b32 d{k // 2}, d{k // 2}, v0, {selector};"


ENTRIES = _shift_out(
    [_insert(k) for k in range(8)],
    ".reg .b32 d0, d1, d2, d3;",
    8,
    before=" ".join(f"mov.b32 d{i}, 0;" for i in range(4)),
    after=" ".join(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, d{i};" for i in range(4)),
)
"""Eight 16-bit numbers: values where the mask has bits, zeros elsewhere."""
PRODUCT_BF16 = _shift_out(
    [f"shl.b32 t, v0, 16; mov.b32 f, t; @p fma.rn.f32 $0, f, ${2 + k}, $0;" for k in range(8)],
    ".reg .f32 f;",
    10,
    before="mov.f32 $0, $1;",
)
"""Operand 1 and the products of the values with operands 2 to 9, in float32."""
PRODUCT_FP16 = _shift_out(
    [
        f"mov.b32 {{h, g}}, v0; cvt.f32.f16 f, h; @p fma.rn.f32 $0, f, ${2 + k}, $0;"
        for k in range(8)
    ],
    ".reg .f32 f; .reg .b16 h, g;",
    10,
    before="mov.f32 $0, $1;",
)
