"""Splits a trace into spans: prompt, reasoning, answer, and the delimiters around the reasoning.

The trace of a reasoning model is ``prompt <think> reasoning </think> answer``. Its five spans follow each other in this
order without gaps, and all but the prompt may be empty. Spans are found in the text of an incremental decode, which tells
the token of each character, so that each span begins and ends at a token.
"""

from logitcache.sections.finder import Finder as Finder
from logitcache.sections.finder import Found as Found
from logitcache.sections.finder import answer_text as answer_text
from logitcache.sections.finder import find as find
from logitcache.sections.finder import text_offset as text_offset
from logitcache.sections.formats import FORMATS as FORMATS
from logitcache.sections.formats import known_pair as known_pair
from logitcache.sections.markers import SECTIONS_GROUP as SECTIONS_GROUP
from logitcache.sections.markers import AnswerRegex as AnswerRegex
from logitcache.sections.markers import Markers as Markers
from logitcache.sections.markers import ReasoningMarkers as ReasoningMarkers
from logitcache.sections.spans import SECTIONS as SECTIONS
from logitcache.sections.spans import SPANS as SPANS
from logitcache.sections.spans import Sections as Sections
from logitcache.sections.text import TokenText as TokenText
