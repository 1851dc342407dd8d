"""How long work says where it is, and how it is asked to stop."""

from collections.abc import Callable

OnStep = Callable[[str, int, int], None]
"""Called with (stage, done, total) when everything finished so far is on disk; may raise to stop.
Must not print to stdout, which is redirected while an lm-eval task runs."""
