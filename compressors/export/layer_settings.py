"""The bit widths of a plan as settings of other programs, which then quantize the model.

The settings say how many bits every matrix gets; rounding, scales and file format are those of the
other program, so that sizes and losses differ a little from the plan.

References
----------
llama.cpp: ``--tensor-type`` of ``llama-quantize``, regular expressions of tensor names and types of
ggml (tools/quantize/quantize.cpp at commit 42ea59b). llm-compressor: ``config_groups`` of a
modifier (examples/quantization_non_uniform at commit 009e5b9), whose weights are arguments of
compressed-tensors 0.20. AutoRound: ``layer_config`` (docs/step_by_step.md at commit 006d7f0).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import yaml
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, get_tensor_name_map

from lrc.compressors.export.gguf_families import family_of
from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.summary import WeightSummary, summarize
from lrc.configs.errors import ExportError
from lrc.configs.size import size_texts

SUPERBLOCK, BLOCK = 256, 32
SUPERBLOCK_TYPES = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K"}
"""Bits -> type of ggml, of rows that `SUPERBLOCK` divides; others are 8 bits."""
BLOCK_TYPES = {2: "IQ4_NL", 3: "IQ4_NL", 4: "IQ4_NL", 5: "Q5_0"}
"""The same of rows that only `BLOCK` divides."""
AUTO_ROUND_BITS = (2, 3, 4, 8)
"""Of its own format."""


@dataclass(frozen=True)
class Settings:
    """Settings of another program."""

    text: str
    notes: list[str]
    """What the program does differently from the plan."""


def layer_settings(program: str, plan: Plan, architecture: Architecture) -> Settings:
    """Return the bit widths of a plan as settings of a program of `PROGRAMS`.

    Raises
    ------
    ExportError
        If matrices are not whole and quantized or dense, or the program has no such model or bits.
    """
    rows = {row.name: row for row in summarize(plan)}
    layers = {w.name for task in plan.tasks for w in task.weights}
    others = sorted(
        {row.config.types for row in rows.values() if row.config.compressed} - {"dense"}
    )
    if others:
        raise ExportError(
            f"--format: {program} has whole matrices of integers only, and the plan has "
            f"{', '.join(others)}; use method: mixed with components: [dense] and schemes"
        )
    matrices = {name: row.config.quantization for name, row in rows.items() if name in layers}
    if not any(matrices.values()):
        raise ExportError(
            f"--format: the plan has no integers, which {program} needs; use method: mixed with "
            "components: [dense] and schemes"
        )
    settings = PROGRAMS[program](matrices, rows, architecture)
    ends = [task.name for task in plan.embeddings]
    if ends and program != "llama.cpp":
        note = f"{' and '.join(ends)}: set separately; these settings are of the decoder layers"
        return Settings(settings.text, [*settings.notes, note])
    return settings


Matrices = Mapping[str, QuantizationArgs | None]
"""Linear layer -> its integers; None if it stays dense."""


def _llama_cpp(
    matrices: Matrices, rows: Mapping[str, WeightSummary], architecture: Architecture
) -> Settings:
    config: Any = architecture.model.config
    names = get_tensor_name_map(family_of(config).arch, config.num_hidden_layers)
    lines, bits = [], 0
    for name, row in rows.items():
        kind = _ggml_type(row.config.quantization, row.shape[1])
        block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        bits += 8 * prod(row.shape) // block * n_bytes
        stored = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        if stored is None:
            raise ExportError(f"{name}: llama.cpp has no such tensor in this architecture")
        if name in matrices:
            lines.append(f"--tensor-type {re.escape(stored.removesuffix('.weight'))}={kind}")
        else:
            option = "--token-embedding-type" if "embd" in stored else "--output-tensor-type"
            lines.append(f"{option} {kind}")
    size, planned = size_texts(bits / 8, sum(row.bits for row in rows.values()) / 8)
    note = f"these matrices take {size} as types of ggml, {planned} as planned"
    return Settings("\n".join(lines), [note])


def _ggml_type(args: QuantizationArgs | None, columns: int) -> str:
    """Return the type of at least as many bits; dense rows and those without blocks are F16."""
    if args is None or columns % BLOCK:
        return "F16"
    kinds = BLOCK_TYPES if columns % SUPERBLOCK else SUPERBLOCK_TYPES
    return kinds.get(args.bits, "Q8_0")


def _llm_compressor(
    matrices: Matrices, rows: Mapping[str, WeightSummary], architecture: Architecture
) -> Settings:
    groups: dict[QuantizationArgs, list[str]] = {}
    for name, args in matrices.items():
        if args is not None:
            groups.setdefault(args, []).append(name)
    ordered = sorted(groups, key=lambda args: (-args.bits, str(args)))
    known = [*matrices, *architecture.unused]
    dense = [name for name in known if matrices.get(name) is None]
    modifier = {
        "ignore": ["lm_head", *dense],
        "config_groups": {
            f"group_{number}": {
                "weights": {
                    "num_bits": args.bits,
                    "type": "int",
                    "symmetric": args.symmetric,
                    "strategy": "channel" if args.group_size is None else "group",
                    **({} if args.group_size is None else {"group_size": args.group_size}),
                    "dynamic": False,
                },
                "targets": groups[args],
            }
            for number, args in enumerate(ordered)
        },
    }
    recipe = {"quant_stage": {"quant_modifiers": {"GPTQModifier": modifier}}}
    return Settings(yaml.safe_dump(recipe, sort_keys=False, width=100).rstrip(), [])


def _auto_round(
    matrices: Matrices, rows: Mapping[str, WeightSummary], architecture: Architecture
) -> Settings:
    used = {args.bits for args in matrices.values() if args is not None}
    config = {
        name: {"bits": 16}
        if args is None
        else {
            "bits": args.bits,
            "group_size": -1 if args.group_size is None else args.group_size,
            "sym": args.symmetric,
        }
        for name, args in matrices.items()
    }
    odd = sorted(used.difference(AUTO_ROUND_BITS))
    notes = []
    if odd:
        listed = ", ".join(map(str, odd))
        notes.append(
            f"{listed} bits: only the mlx format of AutoRound packs them; leave out such schemes "
            "for other formats"
        )
    return Settings(json.dumps(config, indent=2), notes)


PROGRAMS: dict[str, Callable[[Matrices, Mapping[str, WeightSummary], Architecture], Settings]] = {
    "llama.cpp": _llama_cpp,
    "llm-compressor": _llm_compressor,
    "auto-round": _auto_round,
}
"""Name of a program -> how its settings are written."""
