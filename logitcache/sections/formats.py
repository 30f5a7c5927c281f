"""How published reasoning models write their reasoning and their answer."""

from collections.abc import Collection
from dataclasses import dataclass

_HAND_OVER = "<|end|><|start|>assistant<|channel|>final<|message|>"


@dataclass(frozen=True, slots=True)
class Format:
    """The markers of some models. Of several spellings the first is the usual one."""

    opening: tuple[str, ...]
    closing: tuple[str, ...]
    before_answer: tuple[str, ...] = ()  # one of them may follow the closing, and belongs to it
    after_answer: tuple[str, ...] = ()  # what then ends the answer, and is no part of its text
    signs: tuple[str, ...] = ()  # any of them in a vocabulary or chat template tells the format; none: the closing
    always_wrapped: bool = False  # the answer always begins with `before_answer`
    harmony: bool = False  # messages on channels

    @property
    def pair(self) -> tuple[str, str]:
        return self.opening[0], self.closing[0]

    @property
    def literals(self) -> tuple[str, ...]:
        """Every marker."""
        return (*self.opening, *self.closing, *self.before_answer, *self.after_answer)

    def hand_over(self, vocabulary: Collection[str]) -> str:
        """What a model of this vocabulary writes between reasoning and answer."""
        wrapper = next((w for w in self.before_answer if w in vocabulary), "") if self.always_wrapped else ""
        return self.closing[0] + wrapper


# Of models that no comment names, the markers are those of vLLM's reasoning parser or of the model's chat template.
FORMATS = (
    # DeepSeek-R1, Qwen3, QwQ, GLM, MiniMax-M1 and M2, EXAONE 4, Phi-4-reasoning, Nemotron, OLMo 3, Step 3, Kimi K2 and the
    # first Magistral; Hunyuan A13B adds <answer>, ERNIE 4.5 <response>.
    Format(("<think>",), ("</think>",), ("<answer>", "<response>"), ("</answer>", "</response>")),
    Format(("[THINK]",), ("[/THINK]",)),  # Magistral
    Format(("<seed:think>",), ("</seed:think>",)),  # Seed-OSS
    Format(("<mm:think>",), ("</mm:think>",)),  # MiniMax-M3
    Format(("<thought>",), ("</thought>",)),  # EXAONE Deep
    Format(("◁think▷",), ("◁/think▷",)),  # Kimi-VL, Kimi K1.5
    Format(  # Kimi K3
        ("<|open|>think<|sep|>",),
        ("<|close|>think<|sep|>",),
        ("<|open|>response<|sep|>",),
        ("<|close|>response<|sep|>",),
    ),
    Format(  # Cohere's Command A Reasoning; the second wrapper is that of Command A Plus
        ("<|START_THINKING|>",),
        ("<|END_THINKING|>",),
        ("<|START_RESPONSE|>", "<|START_TEXT|>"),
        ("<|END_RESPONSE|>", "<|END_TEXT|>"),
        always_wrapped=True,
    ),
    Format(("<|channel>thought",), ("<channel|>",)),  # Gemma 4
    Format(("<|inner_prefix|>",), ("<|inner_suffix|>",)),  # Apertus
    Format(("<|plamo:begin_think:plamo|>",), ("<|plamo:end_think:plamo|>",)),  # PLaMo 3
    Format(("<|begin_of_thought|>",), ("<|end_of_thought|>",)),  # Sky-T1, OpenThinker
    Format(  # gpt-oss
        ("<|channel|>analysis<|message|>",),
        (_HAND_OVER, "<|channel|>final<|message|>"),
        after_answer=("<|end|>", "<|return|>", "<|call|>"),
        signs=("<|channel|>", "<|channel|>final<|message|>"),
        harmony=True,
    ),
    Format(  # Granite 3.2
        ("Here is my thought process:", "Here's my thought process:"),
        ("Here is my response:", "Here's my response:"),
    ),
    Format(("<reasoning>",), ("</reasoning>",)),
)


def format_of(opening: str, closing: str) -> Format:
    """The known format with these two markers, or one that has only them."""
    known = (f for f in FORMATS if opening in f.opening and closing in f.closing)
    return next(known, Format((opening,), (closing,)))


def detect(vocabulary: Collection[str], template: str) -> Format | None:
    """The first known format whose closing is a single token, or else appears in the chat template."""
    signs = [(f, f.signs or f.closing) for f in FORMATS]
    by_token = (f for f, texts in signs if any(text in vocabulary for text in texts))
    by_template = (f for f, texts in signs if any(text in template for text in texts))
    return next(by_token, None) or next(by_template, None)


def known_pair(text: str) -> tuple[str, str] | None:
    """The markers of the first known format that a text without sections holds, for a hint."""
    held = (f for f in FORMATS if any(marker in text for marker in (*f.opening, *f.closing)))
    found = next(held, None)
    return found.pair if found else None
