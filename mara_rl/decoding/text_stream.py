"""Text of an answer while its tokens come in: no half characters, no part of a stop string."""

from collections.abc import Sequence

from mara_rl.llm.policy_llm import PolicyLLM

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns token ids into text, piece by piece.

    Attributes:
        text: all text so far that is certain to be part of the answer.
        stopped: whether a stop string came; ``text`` ends before it.
    """

    def __init__(self, llm: PolicyLLM, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._llm = llm
        self._stop = tuple(stop)
        self._undecided = ""  # may turn out to begin a stop string
        self._ids: list[int] = []
        self._context = 0  # first token decoded again with new ones: some join to their neighbours
        self._read = 0  # tokens whose text is in `text` or `_undecided`

    def push(self, token_id: int) -> str:
        """The piece of text that is certain now that this token has come; may be empty."""
        self._ids.append(token_id)
        known = self._llm.text(self._ids[self._context : self._read])
        new = self._llm.text(self._ids[self._context :])
        if new.endswith(_UNFINISHED) or len(new) <= len(known):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._emit(new[len(known) :], final=False)

    def finish(self) -> str:
        """The last piece, when no more tokens come: what was held back."""
        known = self._llm.text(self._ids[self._context : self._read])
        new = self._llm.text(self._ids[self._context :])
        self._context = self._read = len(self._ids)
        return self._emit(new[len(known) :], final=True)

    def _emit(self, piece: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._undecided + piece
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            safe = min(found)
            text = text[:safe]
        else:
            safe = len(text) if final else len(text) - self._ambiguous(text)
        self._undecided = text[safe:]
        self.text += text[:safe]
        return text[:safe]

    def _ambiguous(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
