"""An input embedding with quantized rows, and an output head that is tied to it."""

from typing import Any

from torch import Tensor, nn

from lrc.compressors.layers.compressed_linear import CompressedLinear
from lrc.compressors.layers.dense import Dense


class CompressedEmbedding(CompressedLinear):
    """Look up rows of ``W_hat`` [vocabulary, d_model], or multiply by it as the output head.

    The configuration has a single quantized ``dense`` component. Integer inputs are token ids,
    floating ones are states. A head that is tied to the embedding stays tied: `connect` makes it
    use the same integers.
    """

    REPLACES = nn.Embedding

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._set_multiplies(False)

    @property
    def num_embeddings(self) -> int:
        """Size of the vocabulary."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Width of the model."""
        return self.in_features

    def connect(self, model: Any) -> None:
        """Replace every module of `model` whose weight is tied to this one by a `TiedHead`."""
        names = {name for name, module in model.named_modules() if module is self}
        tied = getattr(model, "all_tied_weights_keys", {})
        for head in [head for head, kept in tied.items() if kept.removesuffix(".weight") in names]:
            model.set_submodule(head.removesuffix(".weight"), TiedHead(self))
            del tied[head]  # transformers would tie the parameters by name
            self._set_multiplies(True)

    def _set_multiplies(self, multiplies: bool) -> None:
        for component in self.components:
            if isinstance(component, Dense):
                component.multiplies = multiplies

    def to_dense(self) -> nn.Embedding:  # type: ignore[override]
        """Return the ordinary embedding with the same rows."""
        scale = next(self.parameters())
        rows = self.dense_weight().to(scale.dtype)
        kept: nn.Embedding = nn.Embedding.from_pretrained(rows, freeze=not scale.requires_grad)
        return kept


class TiedHead(nn.Module):
    """Compute logits ``x @ W_hat.T`` with the integers of the embedding, which stores them."""

    owner: CompressedEmbedding
    bias = None  # model classes ask every output head

    def __init__(self, owner: CompressedEmbedding) -> None:
        super().__init__()
        self.in_features, self.out_features = owner.in_features, owner.out_features
        # Not registered as a child: it would be stored and moved twice.
        object.__setattr__(self, "owner", owner)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_model] to [..., vocabulary]."""
        device = next(self.owner.parameters()).device
        # Hooks bring offloaded weights to the device of their input.
        logits: Tensor = self.owner(x if device.type == "meta" else x.to(device))
        return logits.to(x.device)

    def to_dense(self, embedding: nn.Embedding) -> nn.Linear:
        """Return the ordinary head that is tied to the ordinary embedding."""
        head: nn.Linear = nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, bias=False, device="meta"
        )
        head.weight = embedding.weight
        return head

    def extra_repr(self) -> str:
        """Return the shape for `print(model)`."""
        return f"{self.in_features}, {self.out_features}"
