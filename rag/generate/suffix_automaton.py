"""A suffix automaton over token ids (Blumer et al. 1985)."""

from collections.abc import Sequence


class SuffixAutomaton:
    """Every run of tokens of a text that grows (Blumer et al. 1985): amortised constant time a token.

    A state is a set of runs with the same ends; its longest run is `length` long, its shorter endings are reached by
    `link`. The state linked from the whole text's is the longest ending that stands elsewhere, which is earlier.
    """

    def __init__(self, tokens: Sequence[int] = ()):
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._end = [-1], [0], [0]  # _end: tokens up to its first occurrence's end
        self._last = 0
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Add a token at the text's end."""
        self.tokens.append(token)
        at, new = self._last, self._state({}, 0, len(self.tokens), len(self.tokens))
        while at >= 0 and token not in self._next[at]:
            self._next[at][token] = new
            at = self._link[at]
        if at >= 0:
            self._link[new] = self._through(at, token)
        self._last = new

    def _through(self, at: int, token: int) -> int:
        """The state of `at`'s longest run with `token` behind it, parted from longer runs if it shares theirs."""
        old = self._next[at][token]
        if self._length[old] == self._length[at] + 1:
            return old
        new = self._state(dict(self._next[old]), self._link[old], self._length[at] + 1, self._end[old])
        self._link[old] = new
        while at >= 0 and self._next[at].get(token) == old:
            self._next[at][token] = new
            at = self._link[at]
        return new

    def _state(self, follow: dict[int, int], link: int, length: int, end: int) -> int:
        self._next.append(follow)
        self._link.append(link)
        self._length.append(length)
        self._end.append(end)
        return len(self._next) - 1

    @property
    def match(self) -> int:
        """Tokens of the longest ending that stands earlier in the text; the two may overlap."""
        return self._length[self._link[self._last]] if self.tokens else 0

    def draft(self, count: int) -> list[int]:
        """The `count` tokens that followed the match where it first stood, again and again if the text ends first."""
        start = self._end[self._link[self._last]]
        period = len(self.tokens) - start
        return [self.tokens[start + i % period] for i in range(count)]
