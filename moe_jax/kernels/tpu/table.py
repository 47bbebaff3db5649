"""Tiles by chip, operation, dtype and widths. Empty: the rule decides."""

TABLE: dict[tuple[str, str, str, int, int], tuple[int, int, int, int]] = {}
