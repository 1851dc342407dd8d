"""Keys ``embeddings`` and ``lm_head``, which several kinds of stages have."""

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.planning.compile import Draft
from lrc.compressors.planning.embedding_tasks import embedding_task


def add_embeddings(
    draft: Draft, index: int, kind: str, *, embeddings: str | None, lm_head: str | None
) -> None:
    """Add the tasks that quantize embedding and head as a stage requests."""
    for key, scheme in (("embeddings", embeddings), ("lm_head", lm_head)):
        if scheme is None:
            continue
        where = f"stages[{index}].{kind}.{key}"
        earlier = draft.embedding_keys.get(key)
        if earlier is not None:
            draft.problems.add(
                "given-twice",
                where,
                f"must be given once, got it in stages[{earlier}] too; remove one",
            )
            continue
        draft.embedding_keys[key] = index
        task = embedding_task(
            key,
            QuantizationArgs.parse(scheme),
            where,
            index,
            draft.architecture,
            draft.number_bits,
            draft.problems,
        )
        if task is not None:
            draft.embeddings.append(task)
