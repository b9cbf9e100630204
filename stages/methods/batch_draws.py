"""Random draws that are the same in micro-batches as in the complete batch."""

from __future__ import annotations

from typing import Any


class BatchDraws:
    """Mixin for what draws random numbers per image, such as dropout: draws for a batch, and keeps those of its part.

    Subclasses draw for all rows of `part_of`, and give the state of their generator.
    """

    _micro_batch: tuple[slice, int] | None = None
    _state_before: Any = None

    def draw_part(self, rows: slice | None, batch_rows: int, again: bool) -> None:
        """Make further draws for rows of a batch those of the complete batch.

        Args:
            rows: Position of the rows in the complete batch; None: all of it.
            batch_rows: Rows of the complete batch.
            again: Whether an earlier micro-batch of the same batch was drawn for.
        """
        self._micro_batch = None if rows is None else (rows, batch_rows)
        if rows is None:
            return
        if again and self._state_before is not None:
            self._restore(self._state_before)
        else:
            self._state_before = self._state()

    def part_of(self, count: int) -> tuple[slice, int]:
        """Return which rows are used, and how many are drawn for, in a call with `count` images."""
        return self._micro_batch or (slice(None), count)

    def _state(self) -> Any:
        """Return the state of the generator; None without one."""
        raise NotImplementedError

    def _restore(self, state: Any) -> None:
        """Set the state of the generator."""
        raise NotImplementedError
