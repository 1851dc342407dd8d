"""Tensors of a model in safetensors files, by their names there."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrc.compressors.io.finite import all_finite
from lrc.compressors.io.shards import Header, read_folder
from lrc.compressors.models.source import Source, locate
from lrc.compressors.models.weights import not_finite
from lrc.configs.errors import ModelError
from lrc.configs.recipe import Model


class WeightFiles:
    """The weights of a dense model in a folder or on the Hub.

    Parameters
    ----------
    path : str
        Folder or Hub id.

    Raises
    ------
    ModelError
        If there are no weights, or they are quantized.
    RecipeError
        If there is no such folder.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.source: Source = locate(Model(path=path))
        if self.source.gguf is not None:
            raise ModelError(
                f"{path}: is a GGUF file, but deltas need a folder of safetensors in full "
                "precision; give the original model, or convert the file once with transformers "
                "(from_pretrained with gguf_file=..., and save_pretrained)"
            )
        try:
            self.headers: dict[str, Header] = read_folder(self.source.folder)
        except ValueError as error:
            raise ModelError(f"{error}; copy or download it again") from error

    @property
    def folder(self) -> Path:
        """The folder of the files."""
        return self.source.folder

    def read(self, name: str) -> Tensor:
        """Read a tensor.

        Raises
        ------
        ModelError
            If it cannot be read, or is not finite.
        """
        header = self.headers[name]
        try:
            with safe_open(header.file, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{header.file}: can no longer be read ({str(error).strip()[:200]}); put it back "
                "unchanged and run the same command again"
            ) from error
        if tensor.is_floating_point() and not all_finite(tensor.float()):
            text = str(not_finite(name, tensor.dtype))
            raise ModelError(text.replace("model.path: ", f"{self.path}: "))
        return tensor
