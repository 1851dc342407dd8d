"""Messages about recipe keys, in the words of commands that have no recipe."""

from collections.abc import Iterator
from contextlib import contextmanager

from lrc.configs.errors import DataError, ModelError, Problem, RecipeError, UsageError

CODE = "set model.trust_remote_code: true"
WORDS = {
    # Remedies that these commands do not have.
    " or name its folder in model.tokenizer": "",
    ", name another tokenizer under model.tokenizer": "",
    ", or try another model.dtype": "",
    "; set evaluate.dense: true or drop relative": "; remove the x from the gate",
    # Where the problem is. The message names the model.
    "model.path: ": "",
    "model.tokenizer: ": "",
    # Keys before those that they start with.
    "evaluate.perplexity.source": "--perplexity",
    "evaluate.perplexity.window": "--window",
    "evaluate.perplexity": "--perplexity",
    "evaluate.tasks.names": "--tasks",
    "evaluate.tasks.include_path": "--include-path",
    "evaluate.tasks": "--tasks",
    "evaluate.gates": "--gate",
    "evaluate.kl_tokens": "--kl-tokens",
    "evaluate.streaming": "--streaming",
    CODE: "add --trust-remote-code",
}
"""What a message for the user of a recipe contains -> the words for the command line."""

NO_CODE = {f"read that code, then {CODE} to run it": "this command cannot run it"}


def without_keys(text: str, *, runs_code: bool = True) -> str:
    """Replace the keys of a recipe by options.

    `runs_code` tells whether the command has the option ``--trust-remote-code``.
    """
    for key, option in (WORDS if runs_code else NO_CODE | WORDS).items():
        text = text.replace(key, option)
    return text


@contextmanager
def options_in_errors(*, runs_code: bool = True) -> Iterator[None]:
    """Replace the keys of a recipe in error messages by the options of the command."""

    def translate(text: str) -> str:
        return without_keys(text, runs_code=runs_code)

    try:
        yield
    except RecipeError as error:
        raise UsageError(
            [
                Problem(
                    UsageError.default_code if p.code == RecipeError.default_code else p.code,
                    translate(f"{p.where}: ").removesuffix(": "),
                    translate(p.message),
                    p.source,
                )
                for p in error.problems
            ]
        ) from error
    except (ModelError, DataError) as error:
        raise type(error)(translate(str(error)), code=error.code) from error
