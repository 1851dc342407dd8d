"""Which text a stage needs, before any of it is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lrc.compressors.calibrate.calibration_windows import SELF
from lrc.compressors.corpus.documents import SOURCES, read_documents
from lrc.compressors.corpus.excerpts import TextHash
from lrc.configs.errors import RecipeError
from lrc.configs.heal import Block, HealBase
from lrc.configs.recipe import Calibration, Perplexity
from lrc.configs.sources import counts, fractions

TOKENS_PER_SECOND = {"cpu": 3_000, "cuda": 200_000}
"""How much text to read where time is limited: more than is trained on. An H200 trains a model of
135M parameters on up to 175,000 tokens a second."""


@dataclass(frozen=True)
class TextRequest:
    """What text a stage needs of one source."""

    where: str
    """Key path of the stage."""
    options: HealBase
    calibration: Calibration
    """That of the recipe."""
    stage: int
    seed: int
    device: str
    """Type of the device, such as ``cpu``."""
    number: int
    """Of the source among those of the stage."""
    source: str
    """Name or path of the text."""
    fraction: float
    """Of the tokens of the stage."""
    n_held_out: int
    """Number of windows that are held out."""
    wanted: int
    """Number of different windows to train on, at most if time is limited."""

    @property
    def key(self) -> str:
        """Key path of the source."""
        return "calibration.source" if self.options.source is None else f"{self.where}.source"

    @property
    def length(self) -> int:
        """Tokens per window, with BOS."""
        return self.options.length or self.calibration.length

    @property
    def available(self) -> int:
        """Number of windows to take from a text; sampling is slow, so that fewer are sampled."""
        windows = max(1, self.wanted) + self.n_held_out
        return min(windows, self.calibration.samples) if self.source == SELF else windows

    def used(self, steps: int) -> int:
        """Return how many windows that number of steps trains on, the same ones repeatedly."""
        if isinstance(self.options, Block):
            return self.wanted
        return math.ceil(self.fraction * steps * self.options.batch)


def text_requests(
    where: str, options: HealBase, calibration: Calibration, *, stage: int, seed: int, device: str
) -> list[TextRequest]:
    """Return what text a stage needs, one request for every source.

    Parameters
    ----------
    where : str
        Key path of the stage.
    """
    source, length = options.source or calibration.source, options.length or calibration.length
    steps = options.number_of_steps(length)
    if steps is None:
        windows = math.ceil(options.seconds * TOKENS_PER_SECOND[device] / length)
    else:
        windows = steps * options.batch
    wanted = min(windows, options.samples) if isinstance(options, Block) else windows
    held_out = counts(source, max(1, options.held_out // length))
    several = len(held_out) > 1
    return [
        TextRequest(
            where,
            options,
            calibration,
            stage,
            seed,
            device,
            number=number,
            source=name,
            fraction=fractions(source)[name],
            n_held_out=max(1, held_out[name]),
            wanted=max(1, count) if several else count,
        )
        for number, (name, count) in enumerate(counts(source, wanted).items())
    ]


def check_evaluation_texts(request: TextRequest, texts: Sequence[Perplexity]) -> None:
    """Refuse to train on a text that the recipe measures perplexity on.

    The texts as a whole are compared, by their hash. Of a named source, training and evaluation use
    different parts.

    Raises
    ------
    RecipeError
    """
    files = [spec for spec in texts if spec.source not in SOURCES]
    if request.source in (*SOURCES, SELF) or not files:
        return
    calibration = request.calibration
    own = TextHash()
    for _ in own.reading(
        read_documents(
            request.source,
            part="calibration",
            field=calibration.field,
            chat=calibration.chat_template,
            key=request.key,
        )
    ):
        pass
    for spec in files:
        other = TextHash()
        for _ in other.reading(read_documents(spec.source, part="evaluation", field=spec.field)):
            pass
        if other.hexdigest() == own.hexdigest():
            raise RecipeError(
                f"{request.key}: must not be a text that the recipe is evaluated on, got "
                f"{request.source}, which is evaluate.perplexity {spec.name}; give another text"
            )
