"""Keeps passwords and access tokens out of everything that is written or printed."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[hidden]"

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# The last word of a name that holds a secret.
_SECRET = (
    "secret secrets password passwd passphrase pwd key apikey credential credentials authorization auth bearer cookie"
)
# What stands before "token" in the name of a token of a vocabulary.
_OF_A_VOCABULARY = (
    "bos eos pad unk sep cls mask stop start end begin first last next prefix suffix special additional newline per "
    "image img audio video vision boi eoi eot eom soft think thinking reasoning answer user assistant system tool"
)
_VALUE = re.compile(
    r"\b(?:hf_|api_org_)(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{10,}"
    r"|\b(?:sk|rk|pk)-[A-Za-z0-9_-]{16,}"
    r"|\b(?:gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,})"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\bAIza[\w-]{30,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
    r"|(?i:\bbearer\s+[\w.~+/-]{8,}=*)"
)
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@]*:?[^/\s@]*@")
_SIGNED_URL = re.compile(
    r"(?i)(?<=[?&])((?:[\w-]*(?:token|secret|signature|password|credential)|api_?key|key|sig)=)[^&\s#'\"]+"
)

_known: set[str] = set()  # secrets that this process was given


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret: ``hf_token`` and ``apiKey`` do, ``stop_token_ids`` does not."""
    words = [word.lower() for word in _WORDS.findall(name)] or [""]
    if words[-1] == "token":
        return words[-2:-1] == [] or words[-2] not in _OF_A_VOCABULARY.split()
    return words[-1] in _SECRET.split()


def remember(settings: Mapping[str, Any]) -> None:
    """Has ``hide`` replace the secrets among these settings from now on."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            remember(value)
        elif isinstance(value, str) and len(value) > 3 and is_secret(str(name)):
            _known.add(value)


def hide(text: str) -> str:
    """The text with ``[hidden]`` in place of known secrets and of what looks like one; URLs lose their credentials."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _SIGNED_URL.sub(r"\1" + HIDDEN, _USER_OF_URL.sub("", _VALUE.sub(HIDDEN, text)))


def without_secrets(value: Any) -> Any:
    """A JSON value without the entries of mappings and lists that hold secrets; other text as ``hide`` leaves it."""
    if isinstance(value, Mapping):
        return {k: without_secrets(v) for k, v in value.items() if not is_secret(str(k)) and not _is_token(v)}
    if isinstance(value, list | tuple):
        return [without_secrets(v) for v in value if not _is_token(v)]
    return hide(value) if isinstance(value, str) else value


def _is_token(value: Any) -> bool:
    return isinstance(value, str) and (value in _known or _VALUE.fullmatch(value.strip()) is not None)
