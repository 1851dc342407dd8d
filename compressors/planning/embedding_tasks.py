"""What a plan says of the matrices outside the layers: the input embedding and the head."""

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from lrc.compressors.layers import Scheme
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.planning.plan import Matrix
from lrc.configs.recipe import Recipe


def plan_outside(
    recipe: Recipe, architecture: Architecture, number_bits: int, problems: list[str]
) -> list[Matrix]:
    """Let the stages that ask for it round embedding and head to integers.

    Their place in the journal is that of one more layer, behind the last.

    Parameters
    ----------
    number_bits : int
        Of one number of the reference model.
    """
    model = architecture.model
    names = {id(module): name for name, module in model.named_modules()}
    places = {"embeddings": "get_input_embeddings", "lm_head": "get_output_embeddings"}
    found: dict[str, Matrix] = {}
    for index, options in recipe.works.items():
        kind = next(iter(type(recipe.stages[index]).model_fields))
        for key, place in places.items():
            written = getattr(options, key, None)
            if written is None:
                continue
            try:
                module = getattr(model, place)()
            except NotImplementedError:  # of a class that says nowhere which it is
                module = None
            where = f"stages[{index}].{kind}.{key}"
            problem = _problem(key, module, names.get(id(module), ""), architecture)
            if problem is None and key in found:
                problem = (
                    f"must be given once, got it in stages[{found[key].stage}] too; remove one"
                )
            if problem is None:
                problem = _unfit(Scheme.read(written), *module.weight.shape)
            if problem is not None:
                problems.append(f"{where}: {problem}")
                continue
            d_out, d_in = module.weight.shape
            bits = d_out * d_in * number_bits
            found[key] = Matrix(
                name=names[id(module)],
                layer=len(architecture.layer_names),
                shape=(d_out, d_in),
                stage=index,
                method="rtn",
                form="embedded_integers" if key == "embeddings" else "integers",
                sizes={},
                bits=bits,
                source_bits=bits,
                scheme=written,
                rounded=index,
            ).at({})
            if found[key].bits >= bits:
                problems.append(
                    f"{where}: must take fewer bits than the {number_bits} of the model's numbers, "
                    f"got {written}; lower the bits, or raise the size of the groups"
                )
    return list(found.values())


def refuse_other(texts: Mapping[int, str], outside: list[Matrix], problems: list[str]) -> None:
    """Refuse given plans whose embedding or head is rounded as the recipe's is not.

    It is the recipe that says how these are rounded; a plan that was edited would be passed over.

    Parameters
    ----------
    texts : mapping of int to str
        Those of plan files that were read before, by stage.
    """
    planned = {m.name: m.scheme for m in outside}
    for stage, text in texts.items():
        for record in json.loads(text).get("outside", []):
            name, scheme = record["name"], record["scheme"]
            if planned.get(name) == scheme:
                continue
            key = "embeddings" if record["form"] == "embedded_integers" else "lm_head"
            problems.append(
                f"stages[{stage}].decompose.plan: rounds {name} to {scheme}, got "
                f"{planned.get(name) or 'nothing of it'} in the recipe; give '{key}: {scheme}' "
                "there, or edit the plan's 'outside'"
            )


def _problem(key: str, module: Any, name: str, architecture: Architecture) -> str | None:
    """Say why a module cannot be rounded; None if it can."""
    kept = f"{name}.weight"
    if key == "embeddings":
        if type(module) is not nn.Embedding:
            return (
                f"needs an embedding that looks up rows and does no more, got a "
                f"{type(module).__name__}; leave the key out"
            )
        if kept in architecture.tied:
            other = _other(kept, architecture)
            return f"needs an embedding that is kept as such, got one kept as {other}"
        biased = [
            head
            for head in (
                t.removesuffix(".weight") for t, of in architecture.tied.items() if of == kept
            )
            if getattr(architecture.model.get_submodule(head), "bias", None) is not None
        ]
        if biased:
            return f"needs a tied head without a bias, got {biased[0]} with one; leave the key out"
        return None
    if not isinstance(module, nn.Linear):
        got = "none" if module is None else f"a {type(module).__name__}"
        return f"needs a linear layer that gives the logits, got {got}; leave the key out"
    if kept in architecture.tied:
        other = _other(kept, architecture)
        both = _problem("embeddings", architecture.model.get_submodule(other), other, architecture)
        remedy = "leave the key out" if both else "give 'embeddings', which rounds both"
        return f"needs a head of its own, got one that is tied to {other}; {remedy}"
    return None


def _other(kept: str, architecture: Architecture) -> str:
    return architecture.tied[kept].removesuffix(".weight")


def _unfit(scheme: Scheme, d_out: int, d_in: int) -> str | None:
    """Say why the groups of a scheme do not fit rows of `d_in`; None if they do."""
    if scheme.group_size is None or d_in % scheme.group_size == 0:
        return None
    return (
        f"must have groups that divide its rows of {d_in}, got {scheme} for [{d_out}, {d_in}]; "
        "change the size behind -g, or leave it out for one scale a row"
    )
