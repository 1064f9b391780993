"""Streamed text up to the first stop string."""

from collections.abc import Sequence


class StoppedText:
    """Streamed text up to the first stop string; holds back a tail that may be a stop string's beginning."""

    def __init__(self, stop: Sequence[str]):
        self._stop, self._held = [s for s in stop if s], ""
        self.stopped = False

    def push(self, new: str) -> str:
        """The text that is now certain; empty once stopped."""
        if self.stopped:
            return ""
        text = self._held + new
        ends = [at for at in map(text.find, self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The tail that was held back for nothing."""
        return self._held
