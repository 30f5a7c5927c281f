"""The text of tokens, with the token of each character."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Spans = Sequence[tuple[int, int]]
CONTEXT = chr(0xDFFF)  # stands for a token in which no marker counts


class TokenText:
    """The text of a token sequence, and the token of each character.

    Args:
        pieces: the text that each token adds in an incremental decode; None or "" for a token whose bytes are part of a
            character that a later token completes. Such a token belongs to that character.
    """

    def __init__(self, pieces: Sequence[str | None]) -> None:
        self.text = "".join(piece or "" for piece in pieces)
        self.starts: list[int] = []
        position = 0
        for piece in pieces:
            self.starts.append(position)
            position += len(piece or "")
        self.ends = [*self.starts[1:], position] if pieces else []
        for i in range(len(pieces) - 2, -1, -1):
            if not pieces[i]:
                self.ends[i] = self.ends[i + 1]

    def token_at(self, char: int) -> int:
        """The first token of the character ``char``."""
        return bisect_right(self.ends, char)

    def token_after(self, char: int) -> int:
        """The first token that begins at ``char`` or later."""
        return bisect_left(self.starts, char)


class MarkerTokens:
    """Markers that are single tokens of a vocabulary.

    In the text of a trace each of these tokens becomes one symbol, and so it does in the patterns that search for it. Text
    that only spells such a marker with other tokens then matches no pattern.

    Args:
        ids: the token of each marker.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        longest_first = sorted(ids, key=lambda marker: (-len(marker), marker))
        # Lone surrogates: no decoded text has them.
        self._symbols = {marker: chr(0xDC00 + i) for i, marker in enumerate(longest_first)}
        self.symbol_of = {ids[marker]: symbol for marker, symbol in self._symbols.items()}

    @classmethod
    def of(cls, tokenizer: Any, markers: Iterable[str]) -> "MarkerTokens":
        """The markers, and the added tokens inside them, that the tokenizer's vocabulary has."""
        vocabulary, markers = tokenizer.get_vocab(), list(markers)
        added = getattr(tokenizer, "get_added_vocab", dict)()
        # Shorter added tokens are runs of spaces and the like, which other tokens spell too.
        inside = [t for t in added if len(t.strip()) > 2 and any(t in marker for marker in markers)]
        return cls({m: vocabulary[m] for m in [*inside, *markers] if m in vocabulary})

    def pattern(self, *markers: str) -> str:
        """A regular expression that matches any of the markers, in text with symbols."""
        return "(?:" + "|".join(re.escape(self._coded(marker)) for marker in markers) + ")"

    def is_one_token(self, marker: str) -> bool:
        return marker in self._symbols

    def _coded(self, marker: str) -> str:
        for text, symbol in self._symbols.items():
            marker = marker.replace(text, symbol)
        return marker


class TraceText(TokenText):
    """The text of a trace with symbols for marker tokens, and for tokens in which no marker counts.

    Args:
        token_ids: without them no token is a marker by its id.
        context: spans of tokens in which no marker counts.
    """

    def __init__(
        self, pieces: Sequence[str | None], token_ids: Sequence[int], markers: MarkerTokens, context: Spans = ()
    ) -> None:
        symbols = [markers.symbol_of.get(token) for token in token_ids] or [None] * len(pieces)
        for start, end in context:
            symbols[start:end] = [CONTEXT] * (end - start)
        super().__init__([symbol or piece for symbol, piece in zip(symbols, pieces, strict=True)])
        # By how many characters the real text of a symbol is longer, at its position.
        self._longer = [
            (start, len(piece or "") - 1)
            for start, symbol, piece in zip(self.starts, symbols, pieces, strict=True)
            if symbol
        ]

    def start_of(self, token: int) -> int:
        """The first character of a token, or the end of the text."""
        return self.starts[token] if token < len(self.starts) else len(self.text)

    def real(self, char: int) -> int:
        """How many characters of real text the first ``char`` characters are."""
        return char + sum(longer for start, longer in self._longer if start < char)
