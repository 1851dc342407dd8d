"""YAML text to plain values with their lines, and back.

Stricter than PyYAML's own loader where that one loses a user's intent: a key given twice is a
problem, tags build no objects, and scalars follow YAML 1.2, so that `1e-6` is a number and `no`,
`12:30` and `2024-01-01` are strings.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from lrc.configs.places import Finding, Path

# Aliases let a few lines stand for billions of values; no recipe comes near this many.
MAX_VALUES = 100_000

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_CORE_TAGS = {_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_RESOLVERS = (  # YAML 1.2.2, section 10.3.2, and the merge key of YAML 1.1
    ("null", re.compile(r"(~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    ("int", re.compile(rf"({_INT.pattern})\Z"), list("-+0123456789")),
    ("float", re.compile(rf"({_FLOAT.pattern})\Z"), list("-+.0123456789")),
    ("merge", re.compile(r"<<\Z"), ["<"]),
)
_HINTS = (
    (r"found character '\\t'", "indent with spaces, not tabs"),
    (
        r"scanning an alias|undefined alias",
        "put a value that starts with '*' in quotes: '*.down_proj'",
    ),
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
    """The text is not YAML; `line` and `column` count from 1."""

    def __init__(self, line: int, column: int, text: str) -> None:
        self.line, self.column, self.text = line, column, text
        super().__init__(text)


@dataclass
class Document:
    """What a YAML text says."""

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    """Line of every key and list entry."""
    problems: list[tuple[int, Finding]] = field(default_factory=list)
    """Lines where YAML allows something that a recipe does not, and what."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  the base class declares it


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would not read back as a string."""


for _name, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


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
            document.value = _Reader(document).value(root, ())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        character = f"the control character U+{ord(text[error.position]):04X}"
        raise YamlError(line, column, f"{character} is not allowed; remove it") from None
    except yaml.MarkedYAMLError as error:
        raise _in_words(error) from None
    except RecursionError:
        raise YamlError(1, 1, "too deeply nested; a recipe has at most about 10 levels") from None
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


class _Reader:
    """Turns nodes into values, with a separate copy for every alias."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.n_values = 0
        self.open: list[yaml.Node] = []

    def value(self, node: yaml.Node, path: Path) -> Any:
        line = node.start_mark.line + 1
        self.n_values += 1
        if self.n_values > MAX_VALUES:
            raise YamlError(line, 1, f"more than {MAX_VALUES:,} values; repeat fewer aliases")
        if node in self.open:
            raise YamlError(line, 1, "an alias stands for a value that contains it; remove it")
        if node.tag not in _CORE_TAGS:
            tag = node.tag.replace(_TAG, "!!")
            self.report(node, path, f"the tag '{tag}' is not allowed; remove it")
        if isinstance(node, yaml.ScalarNode):
            if not _is_unicode(node):
                self.report(node, path, "half of a surrogate pair is no character; remove it")
            return _scalar(node)
        self.open.append(node)
        if isinstance(node, yaml.SequenceNode):
            value: Any = [self.inside(path, i, each, each) for i, each in enumerate(node.value)]
        else:
            value = self.mapping(node, path)
        self.open.pop()
        return value

    def inside(self, path: Path, step: str | int, place: yaml.Node, node: yaml.Node) -> Any:
        self.document.lines[(*path, step)] = place.start_mark.line + 1
        return self.value(node, (*path, step))

    def mapping(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                merged = self.merge(value_node, path) | merged
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.report(key_node, path, "a key must be a word, not a list or a mapping")
            elif not _is_unicode(key_node):
                self.report(key_node, path, "a key holds half of a surrogate pair; remove it")
            elif (key := str(key_node.value)) in own:
                first = self.document.lines[(*path, key)]
                text = f"given twice, first in line {first}; remove one of the two"
                self.report(key_node, (*path, key), text, "duplicate-key")
            else:
                own[key] = self.inside(path, key, key_node, value_node)
        return merged | own

    def merge(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if isinstance(source, yaml.MappingNode):
                merged = self.value(source, path) | merged
            else:
                self.report(node, (*path, "<<"), "only a mapping can be merged in, as in <<: *name")
        return merged

    def report(self, node: yaml.Node, path: Path, text: str, code: str = "invalid-yaml") -> None:
        self.document.problems.append((node.start_mark.line + 1, Finding(path, code, text)))


def _is_unicode(node: yaml.ScalarNode) -> bool:
    return not re.search("[\ud800-\udfff]", str(node.value))


def _scalar(node: yaml.ScalarNode) -> Any:
    text = str(node.value)
    kind = node.tag.removeprefix(_TAG)
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
