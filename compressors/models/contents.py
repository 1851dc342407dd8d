"""Compare the tensors in the files of a model with those of the module tree.

transformers initializes missing tensors randomly and ignores unknown ones, so a wrong model would
be compressed silently. Here missing tensors are reported as problems, and unknown ones as unused.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from lrc.compressors.io.shards import Header, read_folder, same_tensor
from lrc.compressors.io.shortened import shortened
from lrc.compressors.models.architecture import Architecture, unsupported
from lrc.compressors.models.expert_tensors import Piece, as_header, expert_pieces
from lrc.configs.errors import ModelError

FLOATS = {"F64", "F32", "F16", "BF16"}
# Tables that older versions of transformers stored, and that are computed today.
COMPUTED = re.compile(
    r"(^|[._])(inv_freq|position_ids|masked_bias|causal_mask|(cos|sin)_cached|rope\.freqs"
    r"|relative_position_index|_extra_state)$"
)
TIE = (
    " (if the model uses the embedding as output head, set tie_word_embeddings: true in "
    "config.json)"
)


@dataclass(frozen=True)
class Contents:
    """The tensors in the files, by their names in the module tree."""

    architecture: Architecture
    stored: dict[str, Header]
    """A tied tensor may appear under any of its names."""
    unused: list[Header]
    """Tensors without a place in the module tree, except tables that transformers now computes."""
    problems: list[str]
    """Descriptions of parameters that are missing, stored twice with different values, quantized,
    or of a wrong shape."""
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    """How tensors of single experts are read; `stored` has a description of each."""

    def header_of(self, name: str) -> Header | None:
        """Return the header of a parameter; a tied one may be stored under another name."""
        tied = (each for each, main in self.architecture.tied.items() if main == name)
        return next((self.stored[each] for each in (name, *tied) if each in self.stored), None)

    def untied(self) -> list[str]:
        """Return the tied parameters that differ from the one to which they are tied."""
        return [
            name
            for name, main in self.architecture.tied.items()
            if name in self.stored
            and (other := self.header_of(main)) is not None
            and not same_tensor(self.stored[name], other)
        ]

    def refuse_problems(self, mismatch: str, remedy: str) -> None:
        """Raise a `ModelError` with all problems, if there are any."""
        if self.problems:
            parameters = self.architecture.stored_parameters()
            found = sum(self.header_of(name) is not None for name in parameters)
            raise ModelError(
                f"model.path: the weights in {mismatch}: {shortened(self.problems)}; {found} of "
                f"{len(parameters)} tensors of the model are there; {remedy}"
            )


def read_contents(folder: Path, architecture: Architecture) -> Contents:
    """Compare the headers of a folder of safetensors with a model.

    Names are changed as in transformers: a bare decoder lacks the prefix of the causal model
    (`layers.0...` for `model.layers.0...`), and some architectures were published under older names
    (GPT-NeoX: `embed_out` for `lm_head`).

    Raises
    ------
    ModelError
        An incomplete file; missing, ambiguous or quantized tensors, or wrong shapes, all at once.
    """
    try:
        headers = read_folder(folder)
    except ValueError as error:
        raise ModelError(f"model.path: {error}; copy or download it again") from error
    conversions = get_model_conversion_mapping(architecture.model)
    pieces, used = expert_pieces(headers, conversions, architecture)
    others = {key: header for key, header in headers.items() if key not in used}
    found = renamed(others, conversions, architecture.model)
    names = {key: None if converted else name for key, (name, converted) in found.items()}
    contents = match(others, names, architecture, pieces)
    changed = [key for key, name in names.items() if name is None]
    if changed and contents.problems:
        raise unsupported(
            architecture.model.config,
            "transformers splits, merges or reshapes some of its tensors while it loads them: "
            + shortened(changed, ", "),
        )
    for name, parameter in architecture.stored_parameters().items():
        header = contents.header_of(name)
        if header is None:
            continue
        if header.shape != list(parameter.shape):
            contents.problems.append(f"{name} is {header.shape}, not {list(parameter.shape)}")
        elif parameter.is_floating_point() and header.dtype not in FLOATS:
            contents.problems.append(f"{name} is stored as {header.dtype}: it is quantized")
    contents.refuse_problems(
        f"{folder} do not fit config.json",
        "the folder may be incomplete, or its tensor names need a conversion that lrc does not "
        "know: load and save it once with transformers",
    )
    return contents


def renamed(
    keys: Iterable[str], conversions: Sequence[WeightTransform], model: Any
) -> dict[str, tuple[str, bool]]:
    """Map every key to its name in the module tree, and to whether also the tensor changes.

    A tensor changes if transformers splits, merges or reshapes it.
    """
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    tree, prefix = model.state_dict(), model.base_model_prefix

    def rename(key: str) -> tuple[str, bool]:
        name, converted = rename_source_key(key, renamings, converters, prefix, tree)
        if name not in tree and key in tree:
            return key, False  # a pattern for older names that also matches this one
        return name, converted is not None

    return {key: rename(key) for key in keys}


def match(
    headers: Mapping[str, Header],
    names: Mapping[str, str | None],
    architecture: Architecture,
    pieces: Mapping[str, list[Piece]] = MappingProxyType({}),
) -> Contents:
    """Assign tensors to the module tree.

    `names` maps a key to its name in the module tree, or to None if transformers would also change
    the tensor. `pieces` are those of tensors of experts, which `headers` lacks.
    """
    stored = {name: as_header(parts) for name, parts in pieces.items()}
    contents = Contents(architecture, stored, [], [], dict(pieces))
    tree = architecture.model.state_dict()
    for key, header in headers.items():
        name = names[key]
        if name is not None and name in tree:
            other = contents.stored.setdefault(name, header)
            if not same_tensor(other, header):
                contents.problems.append(f"{other.name} and {key} differ, but are both {name}")
        elif name is not None and not _is_computed(header):
            contents.unused.append(header)
    head = getattr(architecture.model.get_output_embeddings(), "weight", None)
    for name, parameter in architecture.stored_parameters().items():
        if contents.header_of(name) is None:
            contents.problems.append(f"{name} is missing{TIE * (parameter is head)}")
    return contents


def _is_computed(header: Header) -> bool:
    mask = header.name.endswith(".bias") and len(header.shape) == 4  # of causal attention
    return mask or COMPUTED.search(header.name) is not None
