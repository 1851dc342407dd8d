"""Check every type of encoder-decoder models that transformers has, from its config class alone.

``python -m tests.robustness.encoder_decoders docs/encoder-decoders.md`` writes the tables of the
documentation; with names of types, only their rows.
"""

import os
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.robustness.family_check import FamilyCheck, Outcome, byte_tokenizer
from tests.robustness.table import HEADINGS, markdown_row, read_rows, short_reason
from tests.robustness.tiny_models import CHANGES, NotBuilt, shrunk_config
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress

MARK = "<!-- written by tests.robustness.encoder_decoders -->"
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 0}


def families() -> dict[str, type[PreTrainedConfig]]:
    """Return model_type -> config class of every encoder-decoder model of texts."""
    return {
        config.model_type: config
        for config in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        if getattr(config, "is_encoder_decoder", False)
    }


class EncoderDecoderCheck(FamilyCheck):
    """The check of one type: its result computes with the compressed weights."""

    def _save(self) -> None:
        torch.manual_seed(0)
        model = self._tiny()
        self.outcome.model = type(model).__name__
        model.save_pretrained(self.folder / "source")
        byte_tokenizer().save_pretrained(self.folder / "source")

    def _tiny(self) -> Any:
        reasons = []
        for changes in CHANGES:
            try:
                config = shrunk_config(families()[self.outcome.family], **changes)
                for key, token in SPECIAL.items():
                    setattr(config, key, token)
                model: Any = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)](config).eval()
                self._logits(model)
                return model
            except Exception as error:  # whatever a model made for other sizes raises
                reasons.append(" ".join(str(error).split())[:200])
        raise NotBuilt(reasons[0])

    def _try_all(self) -> None:
        names = tuple(f"{name}." for name in self.prepared.dense.layer_names)
        with self._collected("svd-llm"):
            report = compress(self._recipe("svd-llm"), Machine("cpu"))
            self._same_as_stored("svd-llm")
            parameters = self.source.named_parameters()
            in_layers = sum(p.numel() for name, p in parameters if name.startswith(names))
            targeted = report["size"]["targeted"]["dense_bits"] / 32
            self.outcome.compressed = targeted / in_layers

    def _load(self, name: str) -> Any:
        return AutoModelForSeq2SeqLM.from_pretrained(self.folder / name, dtype=torch.float32).eval()

    @torch.no_grad()
    def _logits(self, model: Any) -> Tensor:
        written = self.tokens.flip(1)[:, :17]
        outputs = model(input_ids=self.tokens, decoder_input_ids=written, use_cache=False)
        logits: Tensor = outputs.logits
        return logits


def outcomes(names: Iterable[str] = ()) -> list[Outcome]:
    """Check types, by default all, one after the other."""
    found = []
    for family in sorted(names or families()):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(EncoderDecoderCheck(family, Path(folder)).run())
    return found


def read_statuses(page: str) -> dict[str, str]:
    """Return type -> status in a page; empty if it is about another version of transformers."""
    if f"With transformers {transformers.__version__}," not in page.partition(MARK)[2]:
        return {}
    return {name: status for status, rows in read_rows(page, MARK).items() for name in rows}


def with_tables(page: str, found: Iterable[Outcome]) -> str:
    """Return a page with the rows of these outcomes in its tables."""
    rows = read_rows(page, MARK)
    for each in found:
        for others in rows.values():
            others.pop(each.family, None)
        cells = [each.family, short_reason(each.reason or "; ".join(each.failures))]
        if each.status == "served":
            cells = [each.family, each.model, f"{each.compressed:.0%}"]
        rows[each.status][each.family] = markdown_row(cells)
    total = sum(map(len, rows.values()))
    parts = [
        f"{page.partition(MARK)[0]}{MARK}",
        f"With transformers {transformers.__version__}, {len(rows['served'])} of {total} model "
        "types are supported.",
    ]
    for status, lines in rows.items():
        if lines:
            columns = ["`model_type`", "class", "matrices"]
            columns = columns if status == "served" else ["`model_type`", "reason"]
            head = [markdown_row(columns), "|---" * len(columns) + "|"]
            parts += [HEADINGS[status], "\n".join([*head, *map(lines.get, sorted(lines))])]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the rows of all types, or of those that are given, into the page that is given."""
    page, *names = sys.argv[1:]
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = outcomes(names)
    for each in found:
        print(f"{each.status:<9} {each.seconds:5.1f} s  {each.family}  {each.reason[:200]}")
        for failure in each.failures:
            print(f"          {failure}")
    text = Path(page).read_text(encoding="utf-8")
    Path(page).write_text(with_tables(text, found), encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
