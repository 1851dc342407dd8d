"""Collected problems of a recipe: all of them are reported at once."""

from lrc.configs.errors import Problem, RecipeError


class Problems(list[Problem]):
    """Problems found so far; functions add to it and continue where they can."""

    def add(self, code: str, where: str, message: str) -> None:
        """Add a problem; `where` is the key path, or the file and the name in it."""
        self.append(Problem(code, where, message))

    def raise_if_any(self) -> None:
        """Raise `RecipeError` if there are problems.

        Of problems that differ only in the name of a layer, the first is reported with a count.
        """
        if not self:
            return
        groups: dict[tuple[str, str], list[Problem]] = {}
        for problem in self:
            groups.setdefault((problem.code, problem.where), []).append(problem)
        merged = []
        for (code, where), group in groups.items():
            more = f" (and {len(group) - 1} more of this kind)" if len(group) > 1 else ""
            merged.append(Problem(code, where, group[0].message + more))
        raise RecipeError(merged)
