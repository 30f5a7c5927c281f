"""Finds the sections of a trace."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from logitcache.runtime.patterns import search
from logitcache.sections.formats import Format
from logitcache.sections.harmony import PARTS, Channels, Message
from logitcache.sections.markers import Markers
from logitcache.sections.spans import Sections
from logitcache.sections.text import MarkerTokens, Spans, TraceText


@dataclass(frozen=True, slots=True)
class Found:
    """The sections of a trace, and where its answer is in the text of the completion, in characters."""

    sections: Sections
    answer: slice


class Finder:
    """Finds the sections of traces of one model.

    The opening marker is recognised in the completion, or at the end of the prompt, where a chat template may put it. Text
    of the completion before the opening belongs to the opening. If the prompt ends with a closing marker, thinking is
    switched off, and the completion is all answer. A completion cut before the closing marker is all reasoning. A completion
    without markers is all answer. If there is only a closing marker, the reasoning starts with the completion. A token with
    any character of a marker belongs to the delimiter.

    In an agent's transcript, which has context spans, the answer is in the last turn: everything between the first
    reasoning and the answer is closing.

    Args:
        tokens: the markers that are single tokens; only these tokens are markers then, not text that spells them.
    """

    def __init__(self, markers: Markers, tokens: MarkerTokens) -> None:
        self.markers, self.tokens, self.format = markers, tokens, markers.format
        if (form := self.format) is None:
            return
        self._opening, self._closing = tokens.pattern(*form.opening), tokens.pattern(*form.closing)
        wrapper = rf"\s*{tokens.pattern(*form.before_answer)}" if form.before_answer else ""
        self._hand_over = rf"{self._closing}(?P<wrapper>{wrapper})?" if wrapper else rf"{self._closing}(?P<wrapper>)"
        self._after = rf"\s*{tokens.pattern(*form.after_answer)}\s*\Z" if form.after_answer else r"(?!)"
        self._channels = Channels(tokens) if form.harmony else None
        self._by_token = any(map(tokens.is_one_token, form.opening)) or form.harmony

    @classmethod
    def of(cls, tokenizer: Any, markers: Markers) -> "Finder":
        """The finder for the traces of a transformers tokenizer."""
        return _finder(tokenizer, markers)

    def find(
        self, pieces: Sequence[str | None], prompt_length: int, token_ids: Sequence[int] = (), context: Spans = ()
    ) -> Found:
        """Finds the sections of a trace.

        Args:
            pieces: the text that each of the L tokens adds, prompt included, from one incremental decode.
            prompt_length: number of prompt tokens, <= L.
            token_ids: the L tokens; without them markers are found in the text alone.
            context: spans of the completion that the model did not write.
        """
        text = TraceText(pieces, token_ids, self.tokens, context)
        split = text.start_of(prompt_length)
        if self.format is None:
            found = self._without_markers(text, prompt_length)
        elif self._channels:
            found = self._by_channels(self._channels, text, prompt_length, split)
        else:
            found = self._delimited(self.format, text, prompt_length, split, context)
        sections, answer = found
        start = max(answer.start, text.start_of(context[-1][1]) if context else 0)  # the last turn is graded
        shift = text.real(split)
        stop = max(start, answer.stop)
        return Found(sections, slice(text.real(start) - shift, text.real(stop) - shift))

    def is_opening(self, pieces: Sequence[str | None], token_ids: Sequence[int]) -> bool:
        """Whether these tokens are an opening marker and nothing else."""
        return self._is(self._opening, pieces, token_ids)

    def is_closing(self, pieces: Sequence[str | None], token_ids: Sequence[int]) -> bool:
        """Whether these tokens hand over from reasoning to answer, and are nothing else."""
        return self._is(self._channels.hand_over if self._channels else self._hand_over, pieces, token_ids)

    def usable(self, pieces: Sequence[str | None], token_ids: Sequence[int]) -> int:
        """How many tokens of a cut reasoning a closing can follow: a cut may lie in the header of another message."""
        text = TraceText(pieces, token_ids, self.tokens)
        return text.token_at(self._channels.without_header(text.text)) if self._channels else len(pieces)

    def _is(self, pattern: str, pieces: Sequence[str | None], token_ids: Sequence[int]) -> bool:
        text = TraceText(pieces, token_ids, self.tokens).text
        return re.fullmatch(rf"\s*{pattern}\s*", text, re.DOTALL) is not None

    def _delimited(
        self, form: Format, text: TraceText, prompt_length: int, split: int, context: Spans
    ) -> tuple[Sections, slice]:
        length, end, prompt = len(text.starts), len(text.text), text.text[:split]
        if off := re.search(rf"(?P<opening>{self._opening}\s*)?(?P<closing>{self._hand_over})\s*\Z", prompt):
            closing = text.token_at(off.start("closing"))
            opened = text.token_after(off.start() + len(off["opening"].rstrip())) if off["opening"] else closing
            sections = Sections(text.token_at(off.start()), opened, max(opened, closing), prompt_length, length)
            return sections, self._answer(text, split, off)

        prompt_end = reasoning = prompt_length
        position = split
        if opened := re.search(rf"{self._opening}\s*\Z", prompt):
            prompt_end = text.token_at(opened.start())
        if begun := self._opened_in_completion(text, split, bool(opened)):
            position = begun.end()
            reasoning = text.token_after(position)
        close = re.compile(self._hand_over).search(text.text, position)
        if not (opened or begun or close):
            return self._without_markers(text, prompt_length)
        if context:
            if close and not (opened or begun):  # the turn of the closing begins with its reasoning
                reasoning = max([reasoning, *(stop for _, stop in context if text.start_of(stop) <= close.start())])
            return self._over_turns(text, prompt_end, reasoning, close, context)
        if close is None:
            return Sections(prompt_end, reasoning, length, length, length), slice(end, end)
        stop = max(reasoning, text.token_at(close.start()))
        sections = Sections(prompt_end, reasoning, stop, max(stop, text.token_after(close.end())), length)
        return sections, self._answer(text, close.end(), close)

    def _opened_in_completion(self, text: TraceText, split: int, opened: bool) -> re.Match[str] | None:
        """The opening in the completion: at its start, or behind a preamble. After an opening in the prompt only the former."""
        first = re.compile(rf"\s*{self._opening}").match(text.text, split)
        if first or opened:
            return first
        later = re.compile(self._opening).search(text.text, split)
        close = re.compile(self._closing).search(text.text, split)
        if later and close:
            return later if later.start() < close.start() else None
        return later if self._by_token else None  # text may just mention the marker

    def _over_turns(
        self, text: TraceText, prompt_end: int, reasoning: int, close: re.Match[str] | None, context: Spans
    ) -> tuple[Sections, slice]:
        """The reasoning ends with its turn at the latest, and the answer begins in the last turn."""
        length, last = len(text.starts), context[-1][1]
        turn_end = min((start for start, _ in context if start >= reasoning), default=length)
        stop = max(reasoning, min(turn_end, text.token_at(close.start()) if close else length))
        start, match = text.start_of(last), None
        for match in re.compile(self._hand_over).finditer(text.text, max(start, text.start_of(stop))):
            start = match.end()
        if reasoning >= last and match is None:  # cut in the reasoning of the last turn
            start = len(text.text)
        answer = max(last, stop, text.token_after(start))
        return Sections(prompt_end, reasoning, stop, answer, length), self._answer(text, start, match)

    def _by_channels(
        self, channels: Channels, text: TraceText, prompt_length: int, split: int
    ) -> tuple[Sections, slice]:
        length, end = len(text.starts), len(text.text)
        messages = channels.messages(text.text, split)
        if not messages:
            return self._without_markers(text, prompt_length)

        def body(message: Message) -> int:
            return max(prompt_length, text.token_after(message.start))

        prompt_end = prompt_length
        if messages[0].start <= split:  # the template wrote its header
            prompt_end = text.token_at(messages[0].header)
        opening = reasoning = prompt_end
        final = messages[-1] if messages[-1].kind == "final" else None
        kinds = [message.kind for message in messages]
        if "analysis" in kinds and "final" not in kinds[: (first := kinds.index("analysis"))]:
            last = first
            while last + 1 < len(messages) and kinds[last + 1] == "analysis":
                last += 1
            opening = body(messages[first])
            reasoning = max(opening, text.token_at(messages[last].end)) if messages[last].end < end else length
        start = max(reasoning, body(final)) if final else length
        sections = Sections(prompt_end, opening, reasoning, start, length)
        return sections, slice(max(split, final.start), final.end) if final else slice(end, end)

    def _answer(self, text: TraceText, start: int, close: re.Match[str] | None) -> slice:
        """The characters of the answer that begins at ``start``, without the marker that ends a wrapped one."""
        after = re.compile(self._after).search(text.text, start) if close and close["wrapper"] else None
        return slice(start, after.start() if after else len(text.text))

    def _without_markers(self, text: TraceText, prompt_length: int) -> tuple[Sections, slice]:
        """The answer begins at the first match of the pattern; without a match all is reasoning, without a pattern all is
        answer."""
        answer, length, start = prompt_length, len(text.starts), text.start_of(prompt_length)
        if self.markers.answer_regex is not None:
            found = search(self.markers.answer_regex, text.text, start)
            start = len(text.text) if found is None else found
            answer = length if found is None else max(prompt_length, text.token_at(start))
        return Sections(prompt_length, prompt_length, answer, answer, length), slice(start, len(text.text))


@functools.lru_cache(maxsize=16)
def _finder(tokenizer: Any, markers: Markers) -> Finder:
    form = markers.format
    literals = () if form is None else (*form.literals, *(PARTS if form.harmony else ()))
    return Finder(markers, MarkerTokens.of(tokenizer, literals))


def find(pieces: Sequence[str | None], prompt_length: int, markers: Markers) -> Sections:
    """The sections of a trace by its text alone, as `Finder.find` finds them."""
    return Finder(markers, MarkerTokens({})).find(pieces, prompt_length).sections


def answer_text(text: str, spans: Sections, markers: Markers, offset: int | None = None) -> str:
    """The answer in the text of a stored completion; empty if the completion ended before it.

    Args:
        offset: the trace's ``answer_offset``; None: the answer is what follows the first closing marker.
    """
    if spans.answer.start == spans.answer.stop:
        return ""
    form = markers.format
    start = text_offset(text, markers) if offset is None else offset
    answer, after = text[start:], form.after_answer if form else ()
    stripped = answer.rstrip()
    ending = next((marker for marker in after if stripped.endswith(marker)), "")
    wrapped = form is not None and (form.harmony or text[:start].rstrip().endswith(form.before_answer))
    return stripped.removesuffix(ending).rstrip() if ending and wrapped else answer


def text_offset(text: str, markers: Markers) -> int:
    """Where the answer begins in the text of a completion, by the text alone."""
    if markers.closing is not None and (close := text.find(markers.closing)) >= 0:
        return close + len(markers.closing)
    if markers.answer_regex is not None and (found := search(markers.answer_regex, text)) is not None:
        return found
    return 0
