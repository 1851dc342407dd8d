"""Layers that serving engines fuse into one, which must then have the same integer format."""

from collections.abc import Iterable

FUSED = (
    {"q_proj", "k_proj", "v_proj"},
    {"gate_proj", "up_proj"},
    {"w1", "w3"},
    {"query", "key", "value"},
    {"q_a_proj", "kv_a_proj_with_mqa"},
)
"""Last parts of the names of layers that vLLM and SGLang multiply by as one matrix."""


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of layers, two or more each, that are fused."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for number, leaves in enumerate(FUSED):
            if leaf in leaves:
                groups.setdefault((parent, number), []).append(name)
    return [group for group in groups.values() if len(group) > 1]
