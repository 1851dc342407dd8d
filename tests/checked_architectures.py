"""Check that an architecture runs layer by layer once per process, not in every run of it."""

import copy
from collections.abc import Callable
from dataclasses import replace

from lrc.compressors.models.architecture import Architecture

FOUND = ("unused", "experts", "groups", "plain_layers")
"""Fields of an architecture that the check fills in."""


def once_each(check: Callable[[Architecture], Architecture]) -> Callable[..., Architecture]:
    """Return `check_layers` with a memory; architectures that it refuses are checked again.

    What it finds are names and numbers, which class and configuration determine: it reads no
    weights.
    """
    known = {}

    def checked(architecture: Architecture) -> Architecture:
        names = [linear.name for linear in architecture.linears]
        config = architecture.model.config.to_json_string(use_diff=False)
        structure = names, architecture.layer_names, architecture.tied, architecture.n_encoder
        key = type(architecture.model), config, repr(structure)
        if key not in known:
            found = check(architecture)
            facts = {name: getattr(found, name) for name in FOUND}
            known[key] = {linear.name for linear in found.linears}, copy.deepcopy(facts)
            return found
        kept, facts = known[key]
        linears = [linear for linear in architecture.linears if linear.name in kept]
        return replace(architecture, linears=linears, **copy.deepcopy(facts))

    return checked
