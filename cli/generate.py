"""`lrc generate`: the continuations of one prompt by several models."""

from lrc.cli import console
from lrc.cli.evaluate import check_model
from lrc.cli.option_names import options_in_errors
from lrc.cli.whole_models import find_tokenizer, load_model
from lrc.compressors.evaluate.generations import continue_greedily
from lrc.compressors.io.machine import Machine
from lrc.configs.errors import UsageError


def run(
    models: list[str], prompt: str, *, tokens: int, device: str, trusted: bool = False
) -> dict[str, str]:
    """Return model -> its greedy continuation of `prompt`, at most `tokens` tokens long.

    Raises
    ------
    UsageError
        If the prompt is empty or `tokens` is out of range.
    """
    if not prompt:
        raise UsageError(["--prompt: must contain text, got none; give a sentence to continue"])
    if tokens < 1:
        raise UsageError([f"--tokens: must be a whole number >= 1, got {tokens}"])
    machine = Machine(device)
    with options_in_errors(), machine.current():
        for path in models:
            for text in check_model(path, trusted=trusted):
                console.warn(f"{path}: {text}")
        return {
            path: _continuation(path, prompt, tokens, machine.chosen, trusted) for path in models
        }


def _continuation(path: str, prompt: str, tokens: int, device: str, trusted: bool) -> str:
    tokenizer = find_tokenizer(path, trusted=trusted)
    model = load_model(path, device, trusted=trusted)
    return continue_greedily(model, tokenizer, prompt, tokens).text
