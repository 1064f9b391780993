"""The text of an answer from its tokens, up to the first stop string or repetition."""

from collections.abc import Sequence

from rag.generate import Request
from rag.generate.repetition import UnrepeatedText
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.types import FinishReason


class StoppedText:
    """Ends a streamed text before the first stop string; holds back a tail that may be a stop string's beginning.

    First is the stop string that is complete first, and of those that end together the longest. So the text does not
    depend on the pieces in which it arrives.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop, self._held = [s for s in stop if s], ""
        self.stopped = False

    def push(self, new: str) -> str:
        """Return the text that is certain now; it is empty once stopped."""
        if self.stopped:
            return ""
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return the tail that was held back and began no stop string."""
        return self._held


class EndedText:
    """Ends a streamed text where a request wants it: before the first stop string, or before a repetition."""

    def __init__(self, request: Request):
        self._before_stop = StoppedText(request.stop)
        self._before_repeat = UnrepeatedText() if request.no_repeat else StoppedText(())

    @property
    def stopped(self) -> bool:
        return self._before_stop.stopped or self._before_repeat.stopped

    def push(self, new: str) -> str:
        """Return the text that is certain now."""
        return self._before_repeat.push(self._before_stop.push(new))

    def finish(self) -> str:
        """Return the rest of the text."""
        return self._before_repeat.push(self._before_stop.finish()) + self._before_repeat.finish()


class AnswerText:
    """Turns the tokens of one answer into text, up to where its request wants it to end."""

    def __init__(self, tokenizer: Tokenizer, request: Request):
        self._decoder, self._text = tokenizer.text_stream(), EndedText(request)

    @property
    def stopped(self) -> bool:
        return self._text.stopped

    def push(self, tokens: Sequence[int]) -> str:
        """Return the text that is certain now."""
        return self._text.push("".join(map(self._decoder.push, tokens)))

    def finish(self) -> str:
        """Return the rest of the text."""
        return self._text.push(self._decoder.finish()) + self._text.finish()

    def finish_reason(self, new_tokens: int, max_new_tokens: int) -> FinishReason:
        """Return why the answer ended, by its number of tokens; an end token is not one of them."""
        return "length" if new_tokens == max_new_tokens and not self.stopped else "stop"
