"""Write a compressed checkpoint, one shard in memory at a time."""

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lrc.compressors.checkpoint.elastic_budgets import BUDGET
from lrc.compressors.checkpoint.format import ELASTIC, QUANT_METHOD
from lrc.compressors.distributed.processes import ALONE, Processes
from lrc.compressors.io.files import flush

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 2 * 10**9
READING_THREADS = 4


def write_weights(
    folder: Path,
    meta: dict[str, Tensor],
    read: Callable[[str], Tensor],
    processes: Processes = ALONE,
    *,
    threads: int = 1,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write safetensors shards under the names and with the index that transformers expects.

    Parameters
    ----------
    folder : Path
        Existing folder.
    meta : dict of str to Tensor
        Every tensor of the checkpoint, in order, on the meta device.
    read : callable
        Returns the tensor of a name; called once each, shard after shard.
    processes : Processes
        All of them call this function, and write shards in turn.
    threads : int
        That call `read` at the same time. With one, calls are in the order of `meta`.
    max_shard_bytes : int
        A shard is held in memory while it is written.

    Returns
    -------
    list of Path
        The shards that this process has written.
    """
    split = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_bytes)
    files, written = [*split.filename_to_tensors], []
    with ThreadPoolExecutor(threads, "read") as pool:
        each = map if threads == 1 else pool.map
        for number in processes.turn(len(files)):
            names = split.filename_to_tensors[files[number]]
            tensors = dict(
                zip(names, each(lambda name: read(name).contiguous(), names), strict=True)
            )
            save_file(tensors, folder / files[number], metadata={"format": "pt"})
            tensors.clear()
            written.append(folder / files[number])
            if not processes.first:
                flush(folder / files[number])  # the first process may be on another host
    if split.is_sharded and processes.first:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return written


def reading_threads() -> int:
    """Return how many threads read tensors that are only copied; more do not help."""
    return min(READING_THREADS, os.cpu_count() or 1)


def config_text(model: PreTrainedModel, block: Mapping[str, Any], dtype: str) -> str:
    """Return a ``config.json``: that of the model, `block` as `quantization_config`.

    `architectures` names the class of `model`, which some sources do not state (GGUF files) or
    state for the decoder alone: serving engines and converters choose their code by it.
    """
    content = json.loads(model.config.to_json_string(use_diff=True))
    content |= {"architectures": [type(model).__name__], "dtype": dtype}
    for key in ("_name_or_path", "quantization_config", BUDGET):
        content.pop(key, None)
    if block:
        content["quantization_config"] = block
    if block.get("quant_method") == QUANT_METHOD:
        # `from_pretrained` passes an argument on to the loader only if the config has its name.
        content[BUDGET] = block[ELASTIC]["budgets"][0] if ELASTIC in block else None
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def write_config(
    folder: Path, model: PreTrainedModel, block: Mapping[str, Any], dtype: str
) -> None:
    """Write ``config.json``, see `config_text`."""
    (folder / "config.json").write_text(config_text(model, block, dtype), encoding="utf-8")
