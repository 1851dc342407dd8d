"""Stages of tests of healing."""

from typing import Any

DISTILL = {"method": "distill", "steps": 30, "batch": 4, "rate": 1e-2, "held_out": 512}
BLOCK = {"method": "block", "steps": 20, "batch": 4, "rate": 1e-2, "held_out": 512, "samples": 16}
INT4 = {"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}

STORED: dict[str, list[dict[str, Any]]] = {
    "low_rank": [{"decompose": {"method": "svd", "keep": 0.6, "storage": "low_rank"}}],
    "shared low_rank": [{"decompose": {"method": "basis-sharing", "keep": 0.6}}],
    "pivoted_low_rank": [
        {"decompose": {"method": "svd", "keep": 0.6, "storage": "pivoted_low_rank"}}
    ],
    "sparse": [{"decompose": {"method": "magnitude", "keep": 0.6}}],
    "semi_structured": [{"decompose": {"method": "magnitude", "keep": 0.6, "pattern": "n:8"}}],
    "dictionary": [{"decompose": {"method": "dictionary", "keep": 0.6}}],
    "tensor_train": [{"decompose": {"method": "tensor-train", "keep": 0.6, "rounds": 1}}],
    "quantized low_rank": [
        {"decompose": {"method": "svd", "keep": 0.6, "storage": "low_rank"}},
        {"quantize": {"method": "rtn", "bits": 4}},
    ],
}
"""Stages by what they store: the forms that train, and that absorb adapters."""

MIXED = [
    {"decompose": {"method": "svd", "keep": 0.6, "targets": ["*.mlp.*"]}},
    {"decompose": {"method": "magnitude", "keep": 0.6, "targets": ["*.q_proj", "*.k_proj"]}},
    {"quantize": {"method": "rtn", "bits": 4, "targets": ["*.o_proj"]}},
]
"""A checkpoint of several forms."""
