"""An input embedding whose rows are integers of few bits, and a head that reads the same rows."""

from typing import Any, ClassVar

from torch import Tensor, nn

from lrc.compressors.layers.integers import Integers
from lrc.compressors.layers.packed import dequantized, unpack_integers


class EmbeddedIntegers(Integers):
    """Look up rows of ``W_hat`` [vocabulary, d_model], of which only these are put together.

    A head that is tied to the embedding stays tied: `attach` gives it these integers.
    """

    REPLACES: ClassVar[type[nn.Module]] = nn.Embedding

    @property
    def num_embeddings(self) -> int:
        """Size of the vocabulary, by the name that `nn.Embedding` has for it."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Width of the model, by the name that `nn.Embedding` has for it."""
        return self.in_features

    def attach(self, model: Any, spec: Any) -> None:
        """Put a `TiedHead` in the place of every module whose weight is tied to this one's."""
        names = {name for name, module in model.named_modules() if module is self}
        tied = getattr(model, "all_tied_weights_keys", {})
        for head in [head for head, kept in tied.items() if kept.removesuffix(".weight") in names]:
            model.set_submodule(head.removesuffix(".weight"), TiedHead(self))
            del tied[head]  # of transformers', which ties parameters by name

    def forward(self, x: Tensor, *, head: bool = False) -> Tensor:
        """Map token ids [...] to [..., d_model]; as a `head`, states [..., d_model] to logits."""
        if head:
            return super().forward(x)
        assert self.scheme is not None
        ids, bits = x.flatten(), self.scheme.bits
        packed, scale = self.get_buffer("weight_packed"), self.get_parameter("weight_scale")
        rows = packed.index_select(0, ids)  # refuses ids below 0
        codes = unpack_integers(rows, bits, self.in_features)  # [n, d_model]
        zero = None
        if not self.scheme.symmetric:  # packed along the vocabulary
            columns = self.get_buffer("weight_zero_point").T
            zero = unpack_integers(columns, bits, self.out_features).T[ids]
        return dequantized(codes, scale[ids], zero).view(*x.shape, self.in_features)

    def dense(self) -> nn.Embedding:  # type: ignore[override]  # what it replaced
        """Return the ordinary embedding of the same rows."""
        scale = self.get_parameter("weight_scale")
        rows = self.product().to(scale.dtype)
        kept: nn.Embedding = nn.Embedding.from_pretrained(rows, freeze=not scale.requires_grad)
        return kept


class TiedHead(nn.Module):
    """Compute logits ``x @ W_hat.T`` with the integers of the embedding, which holds them."""

    owner: EmbeddedIntegers

    def __init__(self, owner: EmbeddedIntegers) -> None:
        super().__init__()
        self.in_features, self.out_features = owner.in_features, owner.out_features
        # Past nn.Module's registration: a child would be stored and moved twice.
        object.__setattr__(self, "owner", owner)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_model] to [..., vocabulary], where the embedding is."""
        home = self.owner.get_parameter("weight_scale").device
        # What is offloaded, a hook brings to its input.
        logits: Tensor = self.owner(x if home.type == "meta" else x.to(home), head=True)
        return logits.to(x.device)

    def dense(self, embedding: nn.Embedding) -> nn.Linear:
        """Return the ordinary head that is tied to the ordinary embedding."""
        head: nn.Linear = nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, bias=False, device="meta"
        )
        head.weight = embedding.weight
        return head

    def extra_repr(self) -> str:
        """Show the sizes in a printed model."""
        return f"d_in={self.in_features}, d_out={self.out_features}, {self.owner.scheme}"
