"""A suffix automaton over token ids (Blumer et al. 1985)."""

from collections.abc import Sequence


class SuffixAutomaton:
    """Finds the longest suffix of a growing text that occurs earlier in it, in amortised constant time a token.

    A state is a set of substrings that end at the same positions. Its longest substring has `_length` tokens; its
    suffixes that end at other positions too are reached by `_link`. The state linked from the whole text's is the
    longest suffix that occurs elsewhere, which is earlier.
    """

    def __init__(self, tokens: Sequence[int] = ()):
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._end = [-1], [0], [0]  # _end: tokens up to its first occurrence's end
        self._last = 0
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Append a token to the text."""
        self.tokens.append(token)
        at, new = self._last, self._add_state({}, 0, len(self.tokens), len(self.tokens))
        while at >= 0 and token not in self._next[at]:
            self._next[at][token] = new
            at = self._link[at]
        if at >= 0:
            self._link[new] = self._split(at, token)
        self._last = new

    def _split(self, at: int, token: int) -> int:
        """Return the state of `at`'s longest substring with `token` after it, separate from longer substrings."""
        old = self._next[at][token]
        if self._length[old] == self._length[at] + 1:
            return old
        new = self._add_state(dict(self._next[old]), self._link[old], self._length[at] + 1, self._end[old])
        self._link[old] = new
        while at >= 0 and self._next[at].get(token) == old:
            self._next[at][token] = new
            at = self._link[at]
        return new

    def _add_state(self, follow: dict[int, int], link: int, length: int, end: int) -> int:
        self._next.append(follow)
        self._link.append(link)
        self._length.append(length)
        self._end.append(end)
        return len(self._next) - 1

    @property
    def match(self) -> int:
        """Return the length of the longest suffix that occurs earlier in the text; the two may overlap."""
        return self._length[self._link[self._last]] if self.tokens else 0

    def draft(self, count: int) -> list[int]:
        """Return the `count` tokens that followed the match's first occurrence, repeated if the text ends before."""
        start = self._end[self._link[self._last]]
        period = len(self.tokens) - start
        return [self.tokens[start + i % period] for i in range(count)]
