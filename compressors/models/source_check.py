"""Check that the files of a source contain the model of its config, before any work starts."""

from collections import Counter
from copy import deepcopy
from dataclasses import replace

import torch

from lrc.compressors.io.shards import INDEX, SINGLE, unread_files
from lrc.compressors.io.shortened import shortened
from lrc.compressors.models.architecture import Architecture, build
from lrc.compressors.models.contents import Contents, read_contents
from lrc.compressors.models.source import Source
from lrc.configs.errors import ModelError


def check_contents(
    source: Source, architecture: Architecture
) -> tuple[Source, Architecture, list[str]]:
    """Compare the headers of the files of a source with its model.

    Returns
    -------
    Source, Architecture
        Those given, or untied ones if the files hold two tensors for tied parameters.
    list of str
        Warnings: what is in the files and will not be in the result.

    Raises
    ------
    ModelError
        If the model cannot be the one in the files.
    """
    contents, warnings = _contents(source, architecture)
    untied = contents.untied()
    if untied:
        main = architecture.tied[untied[0]]
        source = _untie(source)
        architecture = build(source)
        contents, warnings = _contents(source, architecture)
        if {*untied} & {*architecture.tied}:
            raise ModelError(
                f"model.path: {untied[0]} in {source.folder} differs from {main}, to which this "
                "architecture always ties it; remove one of them"
            )
        warnings.append(
            f"model.path: {untied[0]} and {main} differ in the source, although its config ties "
            "them; both are kept, and the result is not tied"
        )
    if contents.unused:
        n_bytes = sum(header.nbytes for header in contents.unused)
        names = shortened([header.name for header in contents.unused], ", ")
        warnings.append(
            f"model.path: tensors of the source without a place in "
            f"{type(architecture.model).__name__} are left out ({len(contents.unused)}, "
            f"{n_bytes:,} bytes): {names}"
        )
    return source, architecture, warnings + _precision(source, contents)


def _contents(source: Source, architecture: Architecture) -> tuple[Contents, list[str]]:
    """Return the tensors of a source, and warnings about what is not read of its other contents."""
    if source.gguf:
        # Imported here, because it imports the package gguf, which takes a third of a second.
        from lrc.compressors.models.gguf_source import check_gguf

        return check_gguf(source.folder / source.gguf, architecture)
    contents = read_contents(source.folder, architecture)
    unread = unread_files(source.folder)
    if not unread:
        return contents, []
    single = (source.folder / SINGLE).is_file()
    why = f"transformers reads only {SINGLE}" if single else f"{INDEX} does not list them"
    return contents, [
        f"model.path: weight files that are ignored, because {why}: {shortened(unread, ', ')}"
    ]


def _untie(source: Source) -> Source:
    config = deepcopy(source.config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    return replace(source, config=config)


def _precision(source: Source, contents: Contents) -> list[str]:
    """Warn if the default dtype rounds a source in float16: bfloat16 has three bits fewer."""
    n_bytes: Counter[str] = Counter()
    for header in contents.stored.values():
        n_bytes[header.dtype] += header.nbytes
    chosen = "dtype" in source.spec.model_fields_set
    if chosen or source.dtype != torch.bfloat16 or n_bytes.most_common(1)[0][0] != "F16":
        return []
    return [
        "model.dtype: the source is stored in float16, and the default, bfloat16, rounds it; set "
        "model.dtype: float16 to keep it, or bfloat16 to confirm"
    ]
