"""A model as a folder of safetensors."""

from pathlib import Path


def as_folder(model: Path, folder: Path) -> Path:
    """Return the folder of a model; a GGUF file is converted into `folder` once."""
    if model.suffix != ".gguf":
        return model
    from lrc.compressors.checkpoint.gguf_conversion import convert_gguf
    from lrc.compressors.models.source import load_tokenizer, locate
    from lrc.configs.recipe import Model

    if not (folder / "tokenizer_config.json").is_file():  # written last
        source = locate(Model(path=str(model)))
        convert_gguf(source, folder)
        load_tokenizer(source).save_pretrained(folder)
    return folder
