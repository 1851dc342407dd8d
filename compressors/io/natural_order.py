"""The order in which people expect names with numbers."""


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key for sorting, by which layer 10 comes after layer 9.

    >>> sorted(["layers.10.a", "layers.9.b"], key=natural)
    ['layers.9.b', 'layers.10.a']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
