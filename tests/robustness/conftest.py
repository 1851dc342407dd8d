"""Print the tables that robustness tests collect."""

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print one table per property `table ROW` of the tests that have passed."""
    tables: dict[str, list[dict[str, object]]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, row in report.user_properties:
            if name.startswith("table "):
                tables.setdefault(name.removeprefix("table "), []).append(row)
    for title, rows in tables.items():
        terminalreporter.write_line(f"\n{title}\n")
        terminalreporter.write_line("| " + " | ".join(rows[0]) + " |")
        terminalreporter.write_line("|---" * len(rows[0]) + "|")
        for row in sorted(rows, key=lambda row: str(next(iter(row.values())))):
            terminalreporter.write_line("| " + " | ".join(map(str, row.values())) + " |")
        numbers = [[row[key] for row in rows] for key in list(rows[0])[1:]]
        if all(isinstance(n, int) for column in numbers for n in column):
            sums = [str(sum(column)) for column in numbers]  # type: ignore[arg-type]
            terminalreporter.write_line("| total | " + " | ".join(sums) + " |")
