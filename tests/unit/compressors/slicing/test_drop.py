"""Which models layers can be removed from; tests/end_to_end/test_slicing.py removes them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lrc.compressors.models.architecture import build
from lrc.compressors.models.source import locate
from lrc.compressors.slicing.slices import plan_slices
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Model
from lrc.configs.slice import Drop

SIZES = {"vocab_size": 64, "d_model": 16, "decoder_ffn_dim": 32, "decoder_attention_heads": 2}
LAYERS = {"encoder_layers": 4, "decoder_layers": 4}
# Both give the number of layers as `num_hidden_layers`, which is an alias of the encoder's.
BART = {**SIZES, **LAYERS}
# Here it is derived and cannot be set.
PROPHETNET = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_decoder_attention_heads": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "decoder_ffn_dim": 32,
}


@pytest.mark.parametrize(
    ("family", "options"),
    [("bart", BART), ("marian", {**BART, "pad_token_id": 0}), ("prophetnet", PROPHETNET)],
)
def test_a_config_that_does_not_decide_the_number_of_layers_is_refused(
    family: str, options: dict[str, int], tmp_path: Path
) -> None:
    config = AutoConfig.for_model(family, **options, is_encoder_decoder=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    source = locate(Model(path=str(tmp_path)))
    with pytest.raises(RecipeError) as refused:
        plan_slices({0: Drop(method="drop", keep=0.8)}, source, build(source))
    assert refused.value.problems[0].where == "stages[0].slice.keep"
