"""What the command line changes in its process, it restores."""

import warnings

from lrc.cli.console import quiet_libraries


def test_warnings_are_off_in_the_command_only() -> None:
    before = list(warnings.filters)
    with quiet_libraries():
        warnings.warn("of a library", stacklevel=1)
    assert warnings.filters == before
