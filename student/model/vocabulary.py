"""Whether the ids that traces hold mean the same tokens to a student as to its teacher."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from logitcache.cache.reader import Cache
from logitcache.errors import StudentError, first_line
from logitcache.identity import PROBE, Identity, tokenizer_hash, vocabulary_hash

# V ids of the teacher's logits.

Traces = Sequence[tuple[Cache, np.ndarray]]  # caches with the indices of some of their traces
_ADDED = 64  # most tokens that a student may have added, to be recognised without the teacher's tokenizer
_EXAMPLES = 3


@dataclass(frozen=True, slots=True, eq=False)
class HeldIds:
    """Some ids in traces: as tokens or in rows."""

    ids: np.ndarray  # int64, those that occur, the most frequent first
    traces: int  # that have any of them
    tokens: int
    rows: int

    @property
    def where(self) -> str:
        return f"in {self.traces:,} traces, as {self.tokens:,} of their tokens and in {self.rows:,} rows"


def check_vocabulary(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    identity: Identity,
    traces: Traces = (),
    teacher_tokenizer: str | None = None,
) -> None:
    """Checks that the ids of a cache mean the same to the student.

    A student may have more tokens than the teacher, or fewer, as long as every id that `traces` hold is the same token.
    Ids of a padded teacher head, which are no tokens, join the tail.

    Args:
        traces: that the student will see; without them, every id of the teacher counts as held.
        teacher_tokenizer: folder or hub id, for a student with another tokenizer.
    Raises: StudentError that says which ids differ, and in how many traces.
    """
    name = student.config.name_or_path or type(student).__name__
    mine, same = tokenizer.get_vocab(), tokenizer_hash(tokenizer) == identity.tokenizer_hash
    theirs = mine if same else _teachers_vocabulary(name, tokenizer, identity, teacher_tokenizer)
    rows = _rows(student, name)
    part = min(rows, key=lambda part: rows[part])
    usable = {id_ for token, id_ in theirs.items() if mine.get(token) == id_ and id_ < rows[part]}
    refused = {*theirs.values(), *(mine.values() if traces and not same else ())} - usable
    size = (
        max(*theirs.values(), *(of.vocab_size - 1 for of in (identity, *(cache.identity for cache, _ in traces)))) + 1
    )
    refused_V = np.zeros(size, bool)
    refused_V[[id_ for id_ in refused if id_ < size]] = True
    held = find_ids(refused_V, traces) if traces else HeldIds(refused_V.nonzero()[0], 0, 0, 0)
    if not len(held.ids):
        return
    where = f", {held.where}" if traces else ""
    needed = max(theirs.values()) + 1
    enlarge = f"enlarge it with model.resize_token_embeddings({needed}) and save it"
    if same:
        raise StudentError(
            f"{name}: its {part} has {rows[part]} rows, the cache's ids go up to {needed - 1}{where}; {enlarge}, or use "
            "another student"
        )
    taken = {id_ for id_ in mine.values() if id_ < rows[part]}
    what, way_out = ("other tokens", "use") if taken & set(held.ids.tolist()) else ("missing", f"{enlarge}, or use")
    raise StudentError(
        f"{name}: its tokenizer is not that of {identity.teacher}: {len(held.ids):,} ids that the traces hold are {what} to "
        f"it{where}, such as {_examples(held.ids, theirs, mine, rows[part])}; {way_out} a student with the teacher's tokenizer"
    )


def find_ids(wanted_V: np.ndarray, traces: Traces) -> HeldIds:
    """Where ids occur in traces, as tokens and in rows.

    Args:
        wanted_V: bool [V].
    """
    count_V, with_any, tokens, rows = np.zeros(len(wanted_V), np.int64), 0, 0, 0
    if not wanted_V.any():
        traces = ()
    for cache, indices in traces:
        for i in np.sort(indices):  # shard after shard: those of a cache behind a URL are downloaded
            trace = cache[int(i)]
            found_T, found_E = wanted_V[trace.token_ids], wanted_V[trace.rows.ids]
            if not (found_T.any() or found_E.any()):
                continue
            for ids in (trace.token_ids[found_T], trace.rows.ids[found_E]):
                count_V += np.bincount(ids, minlength=len(wanted_V))
            with_any += 1
            tokens += int(found_T.sum())
            rows += len(np.unique(np.repeat(np.arange(len(trace.rows)), trace.rows.counts)[found_E]))
    ids = count_V.nonzero()[0]
    return HeldIds(ids[np.argsort(-count_V[ids], kind="stable")], with_any, tokens, rows)


def _rows(student: PreTrainedModel, name: str) -> dict[str, int]:
    """Rows of the student's embedding and of its head."""
    modules = {"embedding": student.get_input_embeddings(), "head": student.get_output_embeddings()}
    for part, module in modules.items():
        if module is None:
            raise StudentError(f"{name} has no {part}: give `student` a causal language model")
    return {part: module.weight.shape[0] for part, module in modules.items()}


def _examples(ids: np.ndarray, theirs: dict[str, int], mine: dict[str, int], rows: int) -> str:
    """Such as "17 ('cat' to the teacher, 'dog' to the student)"."""
    names = [{id_: repr(token) for token, id_ in vocabulary.items()} for vocabulary in (theirs, mine)]

    def show(id_: int) -> str:
        teachers, students = (of.get(id_, "no token") for of in names)
        return f"{id_} ({teachers} to the teacher, {students if id_ < rows else 'no row'} to the student)"

    return ", ".join(show(int(id_)) for id_ in ids[:_EXAMPLES])


def _teachers_vocabulary(
    name: str, tokenizer: PreTrainedTokenizerBase, identity: Identity, given: str | None
) -> dict[str, int]:
    """The teacher's vocabulary, proven by the cache's hash of it.

    It is that of `given`, of the teacher where its files are on this machine, or the student's without added tokens.
    Raises: StudentError if it cannot be found.
    """
    if given is not None:
        try:
            teachers = AutoTokenizer.from_pretrained(given)
        except (OSError, ValueError, KeyError) as e:
            raise StudentError(f"`teacher_tokenizer` {given}: cannot be loaded: {first_line(e)}") from e
        if (hash_ := tokenizer_hash(teachers)) != identity.tokenizer_hash:
            raise StudentError(
                f"`teacher_tokenizer` {given} has hash {hash_}, the cache was made with {identity.tokenizer_hash}: give the "
                f"tokenizer of {identity.teacher}"
            )
        return teachers.get_vocab()
    for found in _known_vocabularies(tokenizer, identity):
        return found
    raise StudentError(
        f"{name} has tokenizer {tokenizer_hash(tokenizer)}, the cache of {identity.teacher} was made with "
        f"{identity.tokenizer_hash}: use a student of the teacher's family; if their token ids are the same, give "
        "`teacher_tokenizer`, the teacher's folder or hub id, to compare them"
    )


def _known_vocabularies(tokenizer: PreTrainedTokenizerBase, identity: Identity) -> Iterator[dict[str, int]]:
    if found := _without_added_tokens(tokenizer, identity.tokenizer_hash):
        yield found
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", identity.teacher) and not Path(identity.teacher).exists():
        try:
            teachers = AutoTokenizer.from_pretrained(identity.teacher, local_files_only=True)
        except (OSError, ValueError, KeyError):
            return
        if tokenizer_hash(teachers) == identity.tokenizer_hash:
            yield teachers.get_vocab()


def _without_added_tokens(tokenizer: Any, wanted: str) -> dict[str, int] | None:
    """The student's vocabulary without the last of its added tokens, if that has the hash; None if none has."""
    vocabulary, added = tokenizer.get_vocab(), set(tokenizer.added_tokens_decoder)
    probe: list[int] | None = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    for least in sorted(vocabulary.values(), reverse=True)[:_ADDED]:
        if least not in added:
            return None
        rest = {token: id_ for token, id_ in vocabulary.items() if id_ < least}
        if max(probe or [0]) >= least:
            probe = _probe_without(tokenizer, least)
        if probe is not None and vocabulary_hash(rest, probe) == wanted:
            return rest
    return None


def _probe_without(tokenizer: Any, least: int) -> list[int] | None:
    """Ids of PROBE without added tokens from id `least` on; None for a tokenizer that is not of the tokenizers library."""
    from tokenizers import Tokenizer

    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < least]
    state |= {"post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(state)).encode(PROBE, add_special_tokens=False).ids
