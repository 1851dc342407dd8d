"""The report as one HTML page."""

import logging

# On import matplotlib reports a missing cache, and later fonts, which only the browser needs.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
