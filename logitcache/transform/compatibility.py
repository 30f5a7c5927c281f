"""The identity of a cache made from others: checks what a slice asks for and which caches a merge may combine."""

import difflib
import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields, replace

from logitcache.cache.reader import Cache
from logitcache.errors import IdentityError, InputError
from logitcache.identity import Identity, first_difference
from logitcache.sections import SECTIONS

_TWO_TEACHERS = "a cache has the rows of one teacher only"
_NO_MEANING = "its token ids would lose their meaning"
_NEVER = {
    "teacher": _TWO_TEACHERS,
    "teacher_revision": _TWO_TEACHERS,
    "tokenizer_hash": _NO_MEANING,
    "vocab_size": _NO_MEANING,
    "pin_tokens": "pinned ids cannot be added to existing rows; generate one of the two caches again",
}


def narrowed(
    identity: Identity, top_k: int | None, top_p: float | None, min_k: int | None
) -> tuple[Identity, list[str]]:
    """The identity after cutting rows with these options, and the options that cut anything, as words of ``derived``.

    Raises: InputError for more than the rows of the cache have.
    """
    k, p = identity.top_k if top_k is None else top_k, identity.top_p if top_p is None else top_p
    if not 1 <= k <= identity.top_k:
        pins = f" besides {len(identity.pin_tokens)} pinned ids" if identity.pin_tokens else ""
        raise InputError(f"`top_k` {k}: the cache keeps {identity.top_k} ids per row{pins}; give 1 to {identity.top_k}")
    if top_p is not None and not 0 < top_p <= (identity.top_p or 1):
        what = f"the cache was made with {identity.top_p}" if identity.top_p else "it is a share of a row's mass"
        raise InputError(f"`top_p` {top_p}: {what}; give more than 0 and at most {identity.top_p or 1}")
    if min_k is not None and p is None:
        raise InputError(f"`min_k` {min_k} is the fewest ids that `top_p` keeps; give `top_p` too")
    least = min(identity.min_k, k) if min_k is None else min_k
    most = k if identity.top_p is None else min(k, identity.min_k)
    if min_k is not None and not 1 <= min_k <= most:
        why = f"`top_k` is {k}" if most == k else f"rows of the cache have as few as {most} ids"
        raise InputError(f"`min_k` {min_k}: {why}; give 1 to {most}")
    words = [
        word
        for name, now, before in (
            ("--top-k", k, identity.top_k),
            ("--top-p", p, identity.top_p),
            ("--min-k", min_k, identity.min_k),
        )
        if now is not None and now != before
        for word in (name, str(now))
    ]
    return replace(identity, top_k=k, top_p=p, min_k=least), words


def ends_of(sections: tuple[str, ...] | None, identity: Identity) -> tuple[str, str] | None:
    """The first and the last span that keeps its rows; None if all do.

    Raises: InputError.
    """
    if sections is None:
        return None
    for name in sections:
        if name not in SECTIONS:
            near = difflib.get_close_matches(name, SECTIONS, n=1, cutoff=0.0)[0]
            raise InputError(f"`sections` {name!r} is unknown: did you mean {near}? All: {', '.join(SECTIONS)}")
    kept = [name for name in SECTIONS if name in sections]
    if not kept:
        raise InputError(f"`sections` is empty; give some of {', '.join(SECTIONS)}")
    if kept == ["prompt", "answer"]:
        raise InputError(
            "`sections` prompt,answer leaves a gap, but the rows of a trace must be contiguous; keep all three, and choose "
            "sections when training: `logitcache train --sections prompt,answer`"
        )
    if "prompt" in kept and not identity.prompt_logits:
        raise InputError("`sections` prompt: the cache has no rows for prompts; remove it")
    return None if len(kept) == len(SECTIONS) else (SECTIONS[kept[0]][0], SECTIONS[kept[-1]][-1])


def common(caches: Sequence[Cache], allow: Sequence[str]) -> Identity:
    """The identity of the merged cache: that of the first, if the others differ only in allowed fields.

    Earlier slices, merges and splits may differ, since they change no row; all of them are listed.

    Raises: InputError for an invalid ``allow``, IdentityError for a difference.
    """
    known = [field.name for field in fields(Identity) if field.name != "derived"]
    for name in allow:
        if name.partition(".")[0] not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise InputError(f"`allow` {name}: not a field of an identity; did you mean {near}?")
        if name in _NEVER:
            raise InputError(f"`allow` {name}: {_NEVER[name]}; it cannot differ")
    first, used, derived = caches[0], set(), list(caches[0].identity.derived)
    mine = asdict(first.identity)
    for other in caches[1:]:
        derived += [what for what in other.identity.derived if what not in derived]
        theirs = asdict(other.identity)
        if _origin(other.identity) == _origin(first.identity):
            theirs["derived"] = mine["derived"]
        while difference := first_difference(mine, theirs):
            name, a, b = difference
            field = name.partition(".")[0]
            way_out = _way_out(name, first, other)
            if way_out or not {name, field} & set(allow):
                raise IdentityError(
                    f"{first.location} was made with {name} = {a!r}, {other.location} with {b!r}; "
                    + (way_out or f"`allow` {name} to merge them anyway")
                )
            used.add(name if name in allow else field)
            if name != field and field not in allow:  # only a key of the field
                key = name.partition(".")[2]
                others = {k: v for k, v in theirs[field].items() if k != key}
                theirs[field] = others | {k: v for k, v in mine[field].items() if k == key}
            else:
                theirs[field] = mine[field]
    if used:
        derived.append(shlex.join(["merge", *(word for name in sorted(used) for word in ("--allow", name))]))
    return replace(first.identity, derived=derived)


def _origin(identity: Identity) -> list[str]:
    """The entries of ``derived`` that change the meaning of rows: an import, a crop of the teacher's context."""
    return [what for what in identity.derived if what.split()[0] not in ("slice", "merge", "split")]


def _way_out(name: str, first: Cache, other: Cache) -> str | None:
    """What to do about a difference that cannot be allowed; None for one that can."""
    if name in _NEVER:
        return _NEVER[name]
    if name == "derived":
        return (
            "their rows have different meanings; merge caches whose derived differs only in slices, merges and splits"
        )
    if name == "exact":
        return "its rows are not exact; put it first and `allow` exact" if first.identity.exact else None
    if name == "prompt_logits":
        more = first if first.identity.prompt_logits else other
        return f"`logitcache slice {more.location} --sections reasoning,answer` first"
    if name in ("top_k", "top_p") or (name == "min_k" and first.identity.top_p is not None):
        # None means 1.
        values = [(getattr(cache.identity, name) or 1, str(cache.location)) for cache in (first, other)]
        (less, _), (_, more) = sorted(values)
        return f"`logitcache slice {more} --{name.replace('_', '-')} {less}` first"
    return None
