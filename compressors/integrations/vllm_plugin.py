"""Plugin of vLLM that serves compressed checkpoints.

vLLM calls `register` in each of its processes, because pyproject.toml lists it as an entry point of
the group ``vllm.general_plugins``. Without vLLM, this module is never imported.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import vllm
from torch import nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from lrc.compressors.checkpoint.format import QUANT_METHOD, check_version, parse_modules
from lrc.compressors.checkpoint.plain import QUANT_METHOD as PLAIN_METHOD
from lrc.compressors.checkpoint.plain import matches, plain_targets
from lrc.compressors.integrations.serving_checks import (
    check_supported,
    check_used,
    check_version_of,
    embedding_name,
    fused_names,
)
from lrc.compressors.integrations.vllm_methods import (
    CompressedEmbeddingMethod,
    CompressedLinearMethod,
)
from lrc.compressors.layers import QuantizationArgs, WeightConfig
from lrc.configs.size import MIB

log = logging.getLogger(__name__)

TESTED = ((0, 32), (0, 33))
"""First tested version, and the first that is not: the interface changes between versions."""
ENGINE = f"vLLM {vllm.__version__}"


class LrcConfig(QuantizationConfig):  # type: ignore[misc, unused-ignore]
    """The ``quantization_config`` of a compressed checkpoint, for vLLM.

    Parameters
    ----------
    modules : mapping of str to WeightConfig
        By names of the checkpoint, until vLLM maps them to its own.
    targets : mapping of str to QuantizationArgs
        Of a plain checkpoint instead: what names of layers match, and their integers.
    """

    def __init__(
        self,
        modules: Mapping[str, WeightConfig],
        targets: Mapping[str, QuantizationArgs] | None = None,
    ) -> None:
        super().__init__()
        self.modules, self.targets = dict(modules), dict(targets or {})
        self._used: set[str] = set()
        self._ready: set[str] = set()
        self._expanded: Counter[str] = Counter()
        self._bytes = [0, 0]  # in the file, and as dense matrices

    def get_name(self) -> str:
        """Return the name in ``config.json``."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes in which a model can run."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return -1: no GPU is needed, and kernels check their own requirements."""
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no names: the configuration is in ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LrcConfig":
        """Read the block of ``config.json``.

        Raises
        ------
        CheckpointError
            If the block is damaged, or this plugin does not support the checkpoint or vLLM.
        """
        check_version_of("vllm", vllm.__version__, *TESTED)
        if config["quant_method"] == PLAIN_METHOD:
            return cls({}, plain_targets(config, "config.json"))
        where = "config.json: quantization_config"
        check_version(config.get("format_version"), where)
        modules = parse_modules(config.get("modules", {}), where)
        check_supported(config, modules, ENGINE)
        return cls(modules)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Return the name of this method if the user requests it for a plain checkpoint.

        vLLM refuses integers in it for which it has no kernel; here they are expanded.
        """
        plain = hf_quant_cfg.get("quant_method") == PLAIN_METHOD
        return QUANT_METHOD if plain and user_quant == QUANT_METHOD else None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Replace the names of the checkpoint by those of a model class of vLLM."""
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Return how a layer of vLLM stores its weight; None if that is as usual."""
        if isinstance(layer, VocabParallelEmbedding):
            return self._embedding_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        names = fused_names(prefix, self.packed_modules_mapping)
        configs = [self._config_of(name) for name in names]
        self._used.update(name for name, each in zip(names, configs, strict=True) if each)
        if not any(configs):
            return UnquantizedLinearMethod()
        return CompressedLinearMethod(names, configs, self._report)

    def _config_of(self, name: str) -> WeightConfig | QuantizationArgs | None:
        if name in self.modules:
            return self.modules[name]
        return next((args for target, args in self.targets.items() if matches(name, target)), None)

    def get_checkpoint_weight_mapper(self) -> Any:  # type: ignore[override, unused-ignore]
        """Check that the model has all compressed layers; vLLM calls this before it loads them."""
        if get_pp_group().world_size == 1:
            check_used(self.modules, self._used, ENGINE)
        return super().get_checkpoint_weight_mapper()

    def _embedding_method(self, layer: Any, prefix: str) -> CompressedEmbeddingMethod | None:
        shape = (layer.org_vocab_size, layer.embedding_dim)
        name = embedding_name(prefix, shape, self.modules)
        if name is None:
            return None
        self._used.add(name)
        return CompressedEmbeddingMethod(name, self.modules[name], self._report)

    def _report(
        self, names: Sequence[str], expanded: Sequence[str], stored: int, dense: int
    ) -> None:
        """Warn once, when all layers are ready, about those that are dense matrices in memory."""
        self._ready.update(names)
        if expanded:
            self._expanded.update(expanded)
            self._bytes = [self._bytes[0] + stored, self._bytes[1] + dense]
        if self._expanded and self._ready == self._used:
            forms = ", ".join(f"{form} ({n})" for form, n in self._expanded.most_common())
            log.warning(
                "%s has no kernel for some forms of weights here, which are dense matrices in "
                "memory: %s. These layers take up to %.1f MiB instead of the %.1f MiB in the file.",
                ENGINE,
                forms,
                self._bytes[1] / MIB,
                self._bytes[0] / MIB,
            )


def register() -> None:
    """Make vLLM read checkpoints of lrc, once per process."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(LrcConfig)
