"""The PTX of the kernels for sparse matrices, interpreted."""

import re
import struct

import pytest
import torch

from lrc.compressors.kernels import shift_out

WORD = 2**32 - 1


class Machine:
    """Interpret the instructions that `shift_out` uses; registers of 32 bits by their names."""

    def __init__(self, operands: dict[str, int | float]) -> None:
        self.registers: dict[str, int | float] = dict(operands)

    def value(self, text):
        text = text.strip()
        return self.registers[text] if text in self.registers else int(text, 0)

    def run(self, program: str) -> None:
        body = program.strip()[1:-1].replace("\n", " ")
        for statement in re.findall(r"(?:\{[^}]*\}|[^;{])+;", body):
            self.step(statement.strip().rstrip(";"))

    def step(self, statement: str) -> None:
        if statement.startswith("."):
            return
        if statement.startswith("@p "):
            if not self.registers["p"]:
                return
            statement = statement.removeprefix("@p ")
        name, rest = statement.split(" ", 1)
        braces = re.fullmatch(r"\{(.*), (.*)\}, (.*)", rest)
        if braces:
            low, high, source = braces.groups()
            word = self.value(source)
            self.registers |= {low: word & 0xFFFF, high: word >> 16}
            return
        vector = re.split(r",\s*", rest)
        target, arguments = vector[0], [self.value(text) for text in vector[1:]]
        self.registers[target] = getattr(self, name.replace(".", "_"))(*arguments)

    def mov_b32(self, a):
        return a

    mov_f32 = mov_b32

    def and_b32(self, a, b):
        return a & b

    def setp_ne_b32(self, a, b):
        return a != b

    def shl_b32(self, a, bits):
        return a << bits & WORD

    def shr_u32(self, a, bits):
        return a >> bits

    def shf_r_wrap_b32(self, a, b, bits):
        return (b << 32 | a) >> (bits & 31) & WORD

    def prmt_b32(self, a, b, selector):
        both = b << 32 | a
        return sum((both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i for i in range(4))

    def cvt_f32_f16(self, a):
        return struct.unpack("<e", struct.pack("<H", a))[0]

    def fma_rn_f32(self, a, b, c):
        a = a if isinstance(a, float) else struct.unpack("<f", struct.pack("<I", a))[0]
        return a * b + c


def words_around(codes: list[int], odd: int) -> list[int]:
    """Five words with 16-bit codes from the lower half of the first one, or from the upper one."""
    halves = [0xAAAA] * odd + codes + [0xBBBB] * (10 - odd - len(codes))
    return [halves[2 * i] | halves[2 * i + 1] << 16 for i in range(5)]


@pytest.mark.parametrize("odd", [0, 1])
def test_entries_are_the_values_at_the_bits_of_all_masks(odd):
    for mask in range(256):
        count = mask.bit_count()
        codes = [0x1000 + 7 * i for i in range(count)]
        operands = [*words_around(codes, odd), mask, 16 * odd]
        machine = Machine({f"${8 + i}": value for i, value in enumerate(operands)})
        machine.run(shift_out.ENTRIES)
        left = iter(codes)
        expected = [next(left) if mask >> k & 1 else 0 for k in range(8)]
        assert [machine.registers[f"${k}"] for k in range(8)] == expected


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_are_those_of_the_entries(dtype, odd):
    program = shift_out.PRODUCT_BF16 if dtype == torch.bfloat16 else shift_out.PRODUCT_FP16
    values = torch.arange(1, 9).to(dtype)
    codes = [code & 0xFFFF for code in values.view(torch.int16).tolist()]
    inputs = [10.0**k for k in range(8)]
    for mask in range(256):
        places = [k for k in range(8) if mask >> k & 1]
        words = words_around(codes[: len(places)], odd)
        operands = [0.5, *inputs, *words, mask, 16 * odd]
        machine = Machine({f"${1 + i}": value for i, value in enumerate(operands)})
        machine.run(program)
        expected = 0.5 + sum((i + 1) * inputs[place] for i, place in enumerate(places))
        assert machine.registers["$0"] == expected
