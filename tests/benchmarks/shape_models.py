"""Random models of real shapes: written to disk, or generated whenever a weight is read."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from lrc.compressors.checkpoint.writer import write_weights
from lrc.compressors.models.source import load_tokenizer, locate
from lrc.compressors.models.weights import WeightReader
from lrc.configs.recipe import Model

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "vocab_size", "tie_word_embeddings")
PRESETS = {
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128_256, False),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128_256, False),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128_256, True),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49_152, True),
    "tiny": (64, 96, 2, 4, 2, 512, False),
}
DECAY = 0.5  # singular values fall about as the index to minus this: energies as 1 / index


class RandomModel:
    """The weights of a random model, each from a generator of its own.

    Parameters
    ----------
    config : PreTrainedConfig
    meta : dict of str to Tensor
        The parameters in the files, on the meta device.
    device : str
        On which values are computed.
    depth : int
        Decoder layers of the model of which these are the first and the last: all but two first
        layers, and the last two. It sets the size of what layers add to the residual stream.
    gaussian : bool
        Whether entries are independent, which is made in much less time. Singular values then fall
        less than those of weights.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        meta: dict[str, torch.Tensor],
        device: str,
        depth: int,
        *,
        gaussian: bool = False,
    ) -> None:
        self.config, self.meta = config, meta
        self.depth, self._device, self._gaussian = depth, device, gaussian

    @classmethod
    def llama(
        cls, sizes: dict[str, Any], device: str, depth: int, *, gaussian: bool = False
    ) -> "RandomModel":
        """Return a Llama with values of its config by the names in `SIZES`."""
        config = LlamaConfig(
            **sizes,
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            max_position_embeddings=8192,
        )
        with torch.device("meta"):
            meta = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
        if config.tie_word_embeddings:
            del meta["lm_head.weight"]
        return cls(config, meta, device, depth, gaussian=gaussian)

    def read(self, name: str) -> torch.Tensor:
        """Return a parameter in bfloat16: the same values every time."""
        shape = self.meta[name].shape
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=self._device)
        seed = int.from_bytes(hashlib.sha256(self._name(name).encode()).digest()[:4], "big")
        generator = torch.Generator(self._device).manual_seed(seed)
        if self._gaussian:
            W = torch.randn(*shape, generator=generator, device=self._device)
        else:
            W = random_matrix(*shape, generator)
        return W.mul_(self._std(name, shape[1])).to(torch.bfloat16)

    def _name(self, name: str) -> str:
        """Return the name of a parameter in the model with all layers."""
        parts, n_layers = name.split("."), self.config.num_hidden_layers
        if parts[1] == "layers" and n_layers > 2 and int(parts[2]) >= n_layers - 2:
            parts[2] = str(self.depth - n_layers + int(parts[2]))
        return ".".join(parts)

    def _std(self, name: str, d_in: int) -> float:
        """Return the spread that keeps hidden states near 1 and logits near 1 at any depth."""
        if name == "model.embed_tokens.weight" and not self.config.tie_word_embeddings:
            return 1.0
        adds_to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        return float((d_in * (2 * self.depth if adds_to_residual else 1)) ** -0.5)

    def save(self, folder: Path) -> None:
        """Write config, tokenizer and weights, one matrix on the device at a time."""
        self._save_small_files(folder)
        write_weights(folder, self.meta, lambda name: self.read(name).cpu())

    @contextmanager
    def generated(self, folder: Path) -> Iterator[None]:
        """Save the model without values, which are generated when they are read in the context.

        The file has a header, and its data takes no space on file systems with sparse files. The
        function of the reader that checks and converts values, `WeightReader.read`, is replaced.
        """
        self._save_small_files(folder)
        _write_header(folder / "model.safetensors", self.meta)
        read = WeightReader.read

        def generate(
            reader: WeightReader, name: str, *, device: str | torch.device = "cpu"
        ) -> torch.Tensor:
            if reader.folder != folder:
                return read(reader, name, device=device)
            return self.read(name).to(device)

        WeightReader.read = generate
        try:
            yield
        finally:
            WeightReader.read = read

    def _save_small_files(self, folder: Path) -> None:
        self.config.save_pretrained(folder)
        # A word a token: real text, too, has so many tokens that every Gram matrix is full.
        words = {str(number): number for number in range(self.config.vocab_size)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(folder)


def _write_header(path: Path, meta: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file whose values are zeros that were never written."""
    start, entries = 0, {}
    for name, tensor in meta.items():
        end = start + tensor.nbytes
        entries[name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)


def random_matrix(d_out: int, d_in: int, generator: torch.Generator) -> torch.Tensor:
    """Return a matrix [d_out, d_in] of unit variance and falling singular values, without an SVD.

    It is ``(G1 * s) @ G2`` with Gaussian G1, G2 and a power law s: full rank, as weights are.
    """
    inner, device = min(d_out, d_in), generator.device
    s = torch.arange(1, inner + 1, dtype=torch.float32, device=device).pow(-DECAY)
    right = torch.randn(inner, d_in, generator=generator, device=device)
    right.mul_((s / s.norm())[:, None])
    out = torch.empty(d_out, d_in, device=device)
    for rows in out.split(2**14):  # of an embedding: less memory
        left = torch.randn(len(rows), inner, generator=generator, device=device)
        torch.matmul(left, right, out=rows)
    return out


def write_text(path: Path, model: str, n_tokens: int) -> None:
    """Write the tokenizer's own tokens, drawn by Zipf's law on their ids, as words of a text.

    Ids of byte-pair encodings are about in order of frequency. The packaged text is too short.
    """
    tokenizer = load_tokenizer(locate(Model(path=model)))
    decoded = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=True)
    words = [word for word in map(str.strip, decoded) if word and word.isprintable()]
    weights = 1 / torch.arange(1, len(words) + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(weights, n_tokens, replacement=True, generator=generator)
    path.write_text(" ".join(words[i] for i in drawn.tolist()), encoding="utf-8")
