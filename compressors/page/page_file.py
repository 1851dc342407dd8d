"""Write the page of a finished run, which is complete without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrc.compressors.io.files import write_text

PAGE = "report.html"


def write_page(output: Path, report: dict[str, Any], on_warning: Callable[[str], None]) -> bool:
    """Draw a report into the output folder of its run.

    Returns
    -------
    bool
        Whether that was possible; if not, `on_warning` is told why.
    """
    try:
        # Here, because it takes half a second, and may be damaged without harm to the run.
        from lrc.compressors.page.render import render
        from lrc.compressors.page.saved_runs import finished_run

        write_text(output / PAGE, render([finished_run(output, report)]))
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        on_warning(f"{PAGE}: not drawn ({reason}); `lrc report {output}` tries it again")
        return False
    return True
