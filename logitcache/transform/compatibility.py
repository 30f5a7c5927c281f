"""The identity of a cache that is made of others: what a slice may ask for, and what a merge may put together."""

import difflib
import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields, replace

from logitcache.cache.reader import Cache
from logitcache.errors import IdentityError, InputError
from logitcache.identity import Identity, first_difference
from logitcache.sections import SECTIONS

_TWO_TEACHERS = "the rows of two teachers make no cache"
_NO_MEANING = "its token ids would lose their meaning"
_NEVER = {
    "teacher": _TWO_TEACHERS,
    "teacher_revision": _TWO_TEACHERS,
    "tokenizer_hash": _NO_MEANING,
    "vocab_size": _NO_MEANING,
    "pin_tokens": "rows without a pinned id cannot be given it; generate one of the two again",
}


def narrowed(
    identity: Identity, top_k: int | None, top_p: float | None, min_k: int | None
) -> tuple[Identity, list[str]]:
    """The identity of rows cut so, and the options that cut anything.

    Raises: InputError for what such rows cannot give.
    """
    k, p = identity.top_k if top_k is None else top_k, identity.top_p if top_p is None else top_p
    if not 1 <= k <= identity.top_k:
        pins = f" besides {len(identity.pin_tokens)} pinned ones" if identity.pin_tokens else ""
        raise InputError(f"`top_k` {k}: the cache keeps {identity.top_k} ids a row{pins}; give 1 to {identity.top_k}")
    if top_p is not None and not 0 < top_p <= (identity.top_p or 1):
        what = f"rows were trimmed to {identity.top_p}" if identity.top_p else "it is a share of a row's mass"
        raise InputError(f"`top_p` {top_p}: {what}; give more than 0 and at most {identity.top_p or 1}")
    if min_k is not None and p is None:
        raise InputError(f"`min_k` {min_k} is what `top_p` leaves at least; give `top_p` too")
    least = min(identity.min_k, k) if min_k is None else min_k
    most = k if identity.top_p is None else min(k, identity.min_k)
    if min_k is not None and not 1 <= min_k <= most:
        why = f"`top_k` is {k}" if most == k else f"rows were trimmed to as little as {most} ids"
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
    """The first and the last span that keeps its rows; None where all do."""
    if sections is None:
        return None
    for name in sections:
        if name not in SECTIONS:
            near = difflib.get_close_matches(name, SECTIONS, n=1, cutoff=0.0)[0]
            raise InputError(f"`sections` {name!r} is unknown: did you mean {near}? All: {', '.join(SECTIONS)}")
    kept = [name for name in SECTIONS if name in sections]
    if not kept:
        raise InputError(f"`sections` keeps nothing; name some of {', '.join(SECTIONS)}")
    if kept == ["prompt", "answer"]:
        raise InputError(
            "`sections` prompt,answer leaves a gap, and the rows of a trace are contiguous; keep all three, and choose "
            "sections at training: `logitcache train --sections prompt,answer`"
        )
    if "prompt" in kept and not identity.prompt_logits:
        raise InputError("`sections` prompt: the cache has no rows of prompts; leave it out")
    return None if len(kept) == len(SECTIONS) else (SECTIONS[kept[0]][0], SECTIONS[kept[-1]][-1])


def common(caches: Sequence[Cache], allow: Sequence[str]) -> Identity:
    """The identity of the first cache, where the others' differ in nothing but what is allowed.

    Earlier slices, merges and splits may differ, since they change no row; all of them are listed.

    Raises: InputError for ``allow``, IdentityError for a difference.
    """
    known = [field.name for field in fields(Identity) if field.name != "derived"]
    for name in allow:
        if name.partition(".")[0] not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise InputError(f"`allow` {name} is no field of an identity: did you mean {near}?")
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
                    f"{first.path} was made with {name} = {a!r}, {other.path} with {b!r}; "
                    + (way_out or f"`allow` {name} if you mean to merge them all the same")
                )
            used.add(name if name in allow else field)
            if name != field and field not in allow:  # a key of it alone
                key = name.partition(".")[2]
                others = {k: v for k, v in theirs[field].items() if k != key}
                theirs[field] = others | {k: v for k, v in mine[field].items() if k == key}
            else:
                theirs[field] = mine[field]
    if used:
        derived.append(shlex.join(["merge", *(word for name in sorted(used) for word in ("--allow", name))]))
    return replace(first.identity, derived=derived)


def _origin(identity: Identity) -> list[str]:
    """What was done to the traces that gives their rows another meaning: an import, the crop that a teacher was shown."""
    return [what for what in identity.derived if what.split()[0] not in ("slice", "merge", "split")]


def _way_out(name: str, first: Cache, other: Cache) -> str | None:
    """What to do about a difference that cannot be allowed."""
    if name in _NEVER:
        return _NEVER[name]
    if name == "derived":
        return "their rows say different things; merge caches whose derived differs in slices, merges and splits alone"
    if name == "exact":
        return "its rows are not exact: name it first, and `allow` exact" if first.identity.exact else None
    if name == "prompt_logits":
        more = first if first.identity.prompt_logits else other
        return f"`logitcache slice {more.path} --sections reasoning,answer` first"
    if name in ("top_k", "top_p") or (name == "min_k" and first.identity.top_p is not None):
        # None is a top_p of 1.
        values = [(getattr(cache.identity, name) or 1, str(cache.path)) for cache in (first, other)]
        (less, _), (_, more) = sorted(values)
        return f"`logitcache slice {more} --{name.replace('_', '-')} {less}` first"
    return None
