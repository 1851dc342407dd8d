"""Text: names -> documents -> text -> tokens -> windows.

One module a step: `documents` knows names and files, `hub` and `python_docs` two kinds of named
source, `tokens` what a tokenizer makes of them, `windows` how the tokens are cut. Knows
tokenizers, not models.
"""

from lrc.compressors.corpus.documents import (
    SOURCES,
    Document,
    Part,
    check_source,
    fingerprint,
    read_documents,
)
from lrc.compressors.corpus.tokens import (
    check_vocabulary,
    default_bos,
    join_documents,
    tokenize,
)
from lrc.compressors.corpus.windows import (
    Windows,
    calibration_windows,
    disjoint_windows,
    evaluation_windows,
    random_windows,
)

__all__ = [
    "SOURCES",
    "Document",
    "Part",
    "Windows",
    "calibration_windows",
    "check_source",
    "check_vocabulary",
    "default_bos",
    "disjoint_windows",
    "evaluation_windows",
    "fingerprint",
    "join_documents",
    "random_windows",
    "read_documents",
    "tokenize",
]
