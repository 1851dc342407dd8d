"""Text for calibration and evaluation: sources -> documents -> text -> tokens -> windows."""

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
