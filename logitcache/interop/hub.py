"""A cache on the Hugging Face hub: a dataset repository that holds the directory as it is, and a card about it."""

import contextlib
import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from logitcache.cache import manifest, shard
from logitcache.cache.reader import Cache
from logitcache.cache.verify import verify
from logitcache.errors import (
    CacheError,
    FormatVersionError,
    IdentityError,
    InputError,
    LogitcacheError,
    ShardCorruptError,
    WriteError,
    first_line,
)
from logitcache.identity import first_difference
from logitcache.runtime.files import sync_directory, taken
from logitcache.runtime.locks import exclusive

CARD = "README.md"
_MARK = "<!-- Made by `logitcache push`, which makes it anew; take this line out to keep a card of your own. -->"
_SUFFIXES = (".arrow", ".json")  # of the files of a shard
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FILES = [manifest.FILE_NAME, f"{shard.DIRECTORY}/unit-*.arrow", f"{shard.DIRECTORY}/unit-*.json", CARD]
_SIZES = {
    10**3: "n<1K",
    10**4: "1K<n<10K",
    10**5: "10K<n<100K",
    10**6: "100K<n<1M",
    10**7: "1M<n<10M",
    10**8: "10M<n<100M",
}


def push(cache: Path, repo: str, *, private: bool = True, token: str | None = None, revision: str | None = None) -> str:
    """Makes the dataset repository ``repo`` hold the cache: its manifest, its shards, and a card.

    What is there already and the same is not sent again, so that an upload that broke off goes on. Shards that are there
    and not here are deleted: the repository mirrors the directory, its history keeps what was. What `generate` adds while
    it runs waits for the next push. The card is made anew, for the repository alone; a README.md that someone wrote is
    kept, here or there.

    Args:
        private: a repository that is there already must be so, or not; push never changes who sees it.
        token: None takes the one of `hf auth login`.
        revision: the branch to write to, made where it is missing; None is main.
    Returns: where to look at it.
    Raises: CacheError for a cache that cannot be read, IdentityError where ``repo`` holds another, InputError for a cache
        of no traces, a repository that is not ``private`` as asked and where the hub refuses, LogitcacheError where it
        cannot be reached.
    """
    opened = Cache.open(cache)
    if not len(opened):
        raise InputError(f"{cache} holds no traces yet; run `logitcache generate` first")
    api = _api(token)
    with _reaching(repo):
        url = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        _refuse_visibility(api, url.repo_id, private)
        where: dict[str, Any] = {"repo_id": url.repo_id, "repo_type": "dataset", "revision": revision}
        if revision:
            api.create_branch(url.repo_id, repo_type="dataset", branch=revision, exist_ok=True)
        _refuse_another(api, where, opened)
        # By name: a shard without an index is what a crash left, or what a running `generate` is about to finish.
        names = [manifest.FILE_NAME, *(name for index in opened.shards for name in _files_of(index.name))]
        sent: dict[str, Path | bytes] = {name: cache / name for name in names}
        if _is_written(cache / CARD):
            sent[CARD] = cache / CARD
        elif _MARK.encode() in (_read(api, where, CARD) or _MARK.encode()):
            sent[CARD] = card(opened, url.repo_id).encode()
        there = api.list_repo_files(**where)
        gone = [name for name in there if name.startswith(f"{shard.DIRECTORY}/") and name not in sent]
        message = f"{len(opened):,} traces of {opened.identity.teacher}"
        api.create_commit(**where, operations=_operations(cache, sent, gone), commit_message=message)
    return f"{url}/tree/{revision}" if revision else str(url)


def pull(
    repo: str, out: Path, *, token: str | None = None, revision: str | None = None, workers: int | None = None
) -> Path:
    """Brings the cache that ``repo`` holds to ``out``, and verifies it: every checksum, every trace.

    ``out`` appears once all of it is there and sound. Until then it lies in OUT.part, where the same command goes on; what
    is damaged is taken out of there, so that it fetches just that again.

    Args:
        out: a new directory.
        token: None takes the one of `hf auth login`.
        revision: a branch, a tag or a commit; None is main.
        workers: processes that verify; None takes the machine's cores.
    Raises: InputError where ``out`` holds something or the hub refuses, CacheBusyError where another process makes it,
        ShardCorruptError for a repository that is not sound, FormatVersionError for one of a newer logitcache, WriteError
        where the disk refuses, LogitcacheError where the hub cannot be reached.
    """
    if taken(out):
        raise InputError(f"{out} holds something already; give `out` a new directory")
    api = _api(token)
    place = out.absolute()
    part, lock = place.with_name(place.name + ".part"), place.with_name(f".{place.name}.lock")
    with exclusive(lock, str(out)), contextlib.ExitStack() as stack:
        stack.callback(lock.unlink, missing_ok=True)
        with _reaching(repo):
            # By its commit: all files are of one state of the repository, whoever pushes meanwhile.
            found = api.dataset_info(repo, revision=revision)
            names = {file.rfilename for file in found.siblings or []}
            if manifest.FILE_NAME not in names:
                raise InputError(f"{repo}: no {manifest.FILE_NAME} in it, so it is no cache; check the name")
            api.snapshot_download(repo, repo_type="dataset", revision=found.sha, local_dir=part, allow_patterns=_FILES)
        for path in (part / shard.DIRECTORY).glob("*"):
            if f"{shard.DIRECTORY}/{path.name}" not in names:  # of an older state, which a broken download left
                path.unlink()
        _refuse_damage(repo, part, names, workers)
        shutil.rmtree(part / ".cache", ignore_errors=True)  # how far the download was
        try:
            part.rename(place)
            sync_directory(place.parent)
        except OSError as e:
            raise WriteError(f"{out}: {e.strerror or e}; mend that and run the same command again") from e
    return out


def card(cache: Cache, repo: str = "OWNER/NAME") -> str:
    """README.md of a dataset repository: YAML that opens the shards in the hub's viewer, and what a reader must know.

    The licence is left to whoever publishes: it follows from the teacher's and the prompts'.
    """
    info = cache.info()
    identity = info["identity"]
    kept = f"top-{identity['top_k']}" + (f", cut at mass {identity['top_p']}" if identity["top_p"] is not None else "")
    sampling = ", ".join(f"{k} {v}" for k, v in identity["sampling"].items()) or "none: the text was given"
    size = next((name for below, name in _SIZES.items() if info["traces"] < below), "100M<n<1B")
    facts = {
        "teacher": f"`{identity['teacher']}` at `{identity['teacher_revision']}`",
        "sampling": sampling,
        "support": f"{kept} of {identity['vocab_size']:,} ids a row, {info['mean_support']:.1f} on average; "
        f"{info['mean_tail_mass']:.2%} of the mass in the tail",
        "traces": f"{info['traces']:,} of {info['prompts']:,} prompts",
        "tokens": f"{info['tokens']:,}: "
        + ", ".join(f"{n:,} {name}" for name, n in info["section_tokens"].items() if n),
        "rows": f"{info['taught_rows']:,} (tokens with the teacher's distribution)",
        "size": f"{info['bytes']:,} bytes in {info['shards']:,} shards, {info['bytes_per_token']:.1f} a row",
    }
    if info["verdicts"]["correct"] or info["verdicts"]["incorrect"]:
        facts["verdicts"] = "{correct:,} traces correct, {incorrect:,} not".format(**info["verdicts"])
    return f"""\
---
pretty_name: {json.dumps(f"{identity['teacher']}: text and {kept} distributions")}
task_categories:
- text-generation
tags:
- logitcache
- knowledge-distillation
- logprobs
size_categories:
- {size}
configs:
- config_name: default
  data_files:
  - split: train
    path: {shard.DIRECTORY}/*.arrow
---

# What {identity["teacher"]} said, and what it thought at every token

A cache of logitcache (`pip install logitcache`): prompts, the teacher's completions, and for each token the
teacher's most likely ids with their log-probabilities at temperature 1, and the mass outside them. Students train from
it without the teacher. No licence is stated here: it follows from those of the teacher and of the prompts.

{_table(facts)}

## Reading it

Whole, with every distribution; `pull` holds each byte against its checksum:

```sh
logitcache pull {repo} --out cache
logitcache train --cache cache --student STUDENT --out student
```

```python
from logitcache import Cache

trace = Cache.open("cache")[0]
trace.text, trace.token_ids, trace.sections
trace.rows[:1].ids, trace.rows[:1].logprobs  # of token trace.row_start
```

Its plain columns (tokens, text, sections, answers, verdicts), with nothing of ours:

```python
from datasets import load_dataset

load_dataset("{repo}", split="train")
```

The column `topk` holds the distributions, encoded; `logitcache export --to parquet` unpacks them to plain lists:
`ids`, `logprobs`, and `tail`, the log of the mass outside them.

## Identity

What must agree before two caches are one.

{_table({name: f"`{json.dumps(value, ensure_ascii=False)}`" for name, value in identity.items()})}

{_MARK}
"""


def _table(cells: dict[str, str]) -> str:
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in cells.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _api(token: str | None) -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise InputError("the hub needs huggingface_hub; `pip install huggingface_hub`") from None
    return HfApi(token=token, library_name="logitcache")


def _files_of(name: str) -> list[str]:
    """The files of shard ``name``, in a cache and in a repository."""
    return [f"{shard.DIRECTORY}/{name}{suffix}" for suffix in _SUFFIXES]


def _is_written(path: Path) -> bool:
    """Whether someone wrote the card.

    Raises: InputError for one that the client cannot read.
    """
    try:
        return path.exists() and _MARK not in path.read_text("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: a card must be UTF-8; save it so, or take it away to have one made") from None


def _operations(cache: Path, sent: dict[str, Path | bytes], gone: list[str]) -> list[Any]:
    """Raises: CacheError for a file of the cache that cannot be read."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    try:
        adds = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in sent.items()]
    except (OSError, ValueError) as e:
        raise CacheError(f"{cache}: cannot be read ({first_line(e)}); nothing was sent, run it again") from e
    return [*adds, *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in gone)]


def _read(api: Any, where: dict[str, Any], name: str) -> bytes | None:
    """A small file of the repository; None where it has none."""
    if not api.file_exists(filename=name, **where):
        return None
    with tempfile.TemporaryDirectory() as directory:
        return Path(api.hf_hub_download(filename=name, local_dir=directory, **where)).read_bytes()


def _refuse_visibility(api: Any, repo: str, private: bool) -> None:
    """Raises: InputError where the repository is private and should not be, or the other way round."""
    found = api.dataset_info(repo).private
    if found is not None and found != private:
        here, way_out, other = ("private", "leave out", "public") if found else ("public", "give", "private")
        raise InputError(f"{repo} is {here}; {way_out} `public`, or make it {other} in its settings on the hub first")


def _refuse_damage(repo: str, part: Path, names: set[str], workers: int | None) -> None:
    """Takes out of a download what is not sound; the next one fetches that again and nothing else.

    Args:
        names: of the files in the repository.
    Raises: ShardCorruptError naming the first of it, FormatVersionError for a cache of a newer logitcache.
    """
    try:
        problems = verify(part, workers)
    except FormatVersionError as e:
        raise FormatVersionError(str(e).replace(str(part), repo)) from e
    except CacheError:
        damaged = [manifest.FILE_NAME]
        said = [f"{manifest.FILE_NAME}: not the bytes that were written, by its checksum"]
    else:
        said = [str(p).partition(";")[0].replace(str(part), repo) for p in problems]
        damaged = [name for p in problems for name in _files_of(p.shard)]
    for name in names.intersection(damaged):  # an index may name files elsewhere
        (part / name).unlink(missing_ok=True)
        # By this the client takes a file for fetched.
        (part / ".cache" / "huggingface" / "download" / f"{name}.metadata").unlink(missing_ok=True)
    if said:
        more = f", and {len(said) - 1} more problems" if said[1:] else ""
        raise ShardCorruptError(
            f"{repo}: {said[0]}{more}; run the same command again, it fetches that alone; if it says the same, the cache "
            "must be pushed again"
        )


def _refuse_another(api: Any, where: dict[str, Any], cache: Cache) -> None:
    """Raises: IdentityError where the repository holds a cache of another identity, ShardCorruptError and
    FormatVersionError where it cannot be told."""
    data, repo = _read(api, where, manifest.FILE_NAME), where["repo_id"]
    if data is None:
        return
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / manifest.FILE_NAME).write_bytes(data)
        try:
            there = manifest.read(Path(directory))
        except FormatVersionError as e:
            raise FormatVersionError(str(e).replace(directory, repo)) from e
        except ShardCorruptError as e:
            raise ShardCorruptError(
                f"{repo}/{manifest.FILE_NAME}: not the bytes that were written, by its checksum; delete it there, or give "
                "another repository"
            ) from e
    if difference := first_difference(asdict(there), asdict(cache.identity)):
        name, theirs, ours = difference
        raise IdentityError(
            f"{repo} holds a cache with {name} = {theirs!r}, {cache.path} has {ours!r}; give another repository"
        )


@contextlib.contextmanager
def _reaching(repo: str) -> Iterator[None]:
    """Errors of the hub, its client, the network between and the disk here, said in one line."""
    try:
        yield
    except LogitcacheError:
        raise
    except Exception as e:  # whichever HTTP library this version of the client stands on
        code = getattr(e, "errno", None)
        # Errors of the network are OSErrors too, but of no file.
        if code in (*_FULL, errno.EIO, errno.EFBIG) or getattr(e, "filename", None) is not None:
            way_out = "free some space" if code in _FULL else "mend that"
            raise WriteError(
                f"{repo}: this machine refuses ({first_line(e)}); {way_out} and run the same command again"
            ) from e
        status = getattr(getattr(e, "response", None), "status_code", None)
        unread = isinstance(e, (json.JSONDecodeError, UnicodeDecodeError))  # an answer that is not the hub's
        if (isinstance(e, ValueError) and not unread) or status in (400, 401, 403, 404, 409, 422):
            way_out = "check the name, and `hf auth login` with a token that may do this"
            raise InputError(f"{repo}: the hub refuses ({first_line(e)}); {way_out}") from e
        raise LogitcacheError(
            f"{repo}: the hub cannot be reached ({first_line(e)}); check the network, HF_ENDPOINT and HF_HUB_OFFLINE, "
            "and run the same command again: it goes on where it was"
        ) from e
