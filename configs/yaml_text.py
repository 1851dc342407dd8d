"""YAML text to plain values with their lines, and back.

Stricter than PyYAML's own loader where that one loses a user's intent: a key given twice is a
problem, tags build no objects, and scalars follow YAML 1.2, so that `1e-6` is a number and `no`,
`12:30` and `2024-01-01` are strings.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from lrc.configs.places import Path

# Aliases let a few lines stand for billions of values; no recipe comes near this many.
MAX_VALUES = 100_000

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_CORE_TAGS = {_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_RESOLVERS = (  # YAML 1.2.2, section 10.3.2, and the merge key of YAML 1.1
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
)
_HINTS = (
    (r"found character '\\t'", "indent with spaces, not tabs"),
    (r"alias", "put a value that starts with '*' in quotes: '*.down_proj'"),
    (r"scanning an anchor", "put a value that starts with '&' in quotes"),
    (r"scanning a tag|tag handle", "put a value that starts with '!' in quotes"),
    (r"cannot start any token", "put a value that starts with '%', '@' or '`' in quotes"),
    (
        r"mapping values are not allowed",
        "indent this line like its neighbours, and put a value that contains ': ' in quotes",
    ),
    (r"could not find expected ':'", "write 'key: value', with a colon and a space"),
    (r"parsing a flow sequence", "a ',' or the closing ']' is missing"),
    (r"parsing a flow mapping", "a ',' or the closing '}' is missing"),
    (r"quoted scalar.*unexpected end", "close the quote"),
    (r"unknown escape|escape sequence", "use single quotes, in which a backslash is a backslash"),
    (r"found '<scalar>'", "put the whole value in one pair of quotes"),
    (r"parsing a block mapping", "indent this line like its neighbours"),
    (r"parsing a block collection", "start every entry of the list with '- ', equally indented"),
    (r"single document", "remove the line '---' and what follows it"),
)


class YamlError(Exception):
    """The text is not YAML, or uses what no recipe needs; `line` and `column` count from 1."""

    def __init__(self, line: int, column: int, text: str) -> None:
        self.line, self.column, self.text = line, column, text
        super().__init__(text)


@dataclass
class Document:
    """The content of a YAML text, with a separate copy for every alias."""

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    """Line of every key and list entry."""
    problems: list[tuple[Path, str, str]] = field(default_factory=list)
    """Place, code and message of every key that is given twice."""
    _n_values: int = 0

    def read(self, node: yaml.Node, path: Path, place: yaml.Node | None = None) -> Any:
        """Return the value of a node at `path`, and note its line, that of `place`."""
        if place is not None:
            self.lines[path] = place.start_mark.line + 1
        self._n_values += 1
        if self._n_values > MAX_VALUES:
            raise _error(node, f"more than {MAX_VALUES:,} values; repeat fewer aliases")
        if node.tag not in _CORE_TAGS:
            tag = node.tag.replace(_TAG, "!!")
            raise _error(node, f"the tag '{tag}' is not allowed; remove it")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node.tag.removeprefix(_TAG), _text(node))
        if isinstance(node, yaml.SequenceNode):
            return [self.read(each, (*path, i), each) for i, each in enumerate(node.value)]
        return self._mapping(node, path)

    def _mapping(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        # merged keys first, so that the lines of the mapping's own keys replace theirs
        for key_node, value_node in sorted(node.value, key=lambda pair: pair[0].tag != _MERGE):
            if key_node.tag == _MERGE:
                several = isinstance(value_node, yaml.SequenceNode)
                for source in value_node.value if several else [value_node]:
                    if not isinstance(source, yaml.MappingNode):
                        raise _error(source, "only a mapping can be merged in, as in <<: *name")
                    merged = self.read(source, path) | merged
            elif (key := _text(key_node)) in own:
                line = key_node.start_mark.line + 1
                text = f"given twice, again in line {line}; remove one of the two"
                self.problems.append(((*path, key), "duplicate-key", text))
            else:
                own[key] = self.read(value_node, (*path, key), key_node)
        return merged | own


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  the base class declares it


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would not read back as a string."""


for _name, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"({_pattern})\Z"), _first)


def read_yaml(text: str) -> Document:
    """Read one YAML document.

    Raises
    ------
    YamlError
        If the text is not YAML, or nested or repeated beyond reason.
    """
    document = Document()
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is not None:
            document.value = document.read(root, ())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        character = f"the control character U+{ord(text[error.position]):04X}"
        raise YamlError(line, column, f"{character} is not allowed; remove it") from None
    except yaml.MarkedYAMLError as error:
        raise _in_words(error) from None
    except RecursionError:
        text = "too deeply nested, or an alias inside the value that it stands for; flatten it"
        raise YamlError(1, 1, text) from None
    return document


def write_yaml(value: Any) -> str:
    """Write plain values as YAML that both `read_yaml` and YAML 1.1 readers read back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _in_words(error: yaml.MarkedYAMLError) -> YamlError:
    said = f"{error.context or ''} {error.problem or ''}"
    mark = error.problem_mark or error.context_mark
    assert mark is not None  # every scanner, parser and composer error has one
    text = f"{error.problem}"
    start = error.context_mark
    if start is not None and start.line != mark.line:
        text += f" ({error.context}, which starts in line {start.line + 1})"
    hints = (hint for pattern, hint in _HINTS if re.search(pattern, said))
    text += f"; {next(hints, 'check the indentation, colons and quotes near this line')}"
    return YamlError(mark.line + 1, mark.column + 1, text)


def _error(node: yaml.Node, text: str) -> YamlError:
    return YamlError(node.start_mark.line + 1, node.start_mark.column + 1, text)


def _text(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise _error(node, "a key must be a word, not a list or a mapping")
    text = str(node.value)
    if re.search("[\ud800-\udfff]", text):
        raise _error(node, "half of a surrogate pair is no character; remove it")
    return text


def _scalar(kind: str, text: str) -> Any:
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if kind == "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        pass  # `!!int word`, or more digits than Python reads: the check of types explains it
    return text
