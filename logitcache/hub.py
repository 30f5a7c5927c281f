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

from logitcache import manifest, shard
from logitcache.cache import Cache
from logitcache.errors import IdentityError, InputError, LogitcacheError, ShardCorruptError, WriteError, first_line
from logitcache.files import exclusive
from logitcache.verify import verify

CARD = "README.md"
_MARK = "<!-- Made by `logitcache push`, which makes it anew; take this line out to keep a card of your own. -->"
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
    and not here are deleted: the repository mirrors the directory, its history keeps what was. The card is made anew, for
    the repository alone; a README.md that someone wrote is kept, here or there.

    Args:
        private: where the repository is yet to be made.
        token: None takes the one of `hf auth login`.
        revision: the branch to write to, made where it is missing; None is main.
    Returns: where to look at it.
    Raises: CacheError for a cache that cannot be read, IdentityError where ``repo`` holds another, InputError for a cache
        of no traces and where the hub refuses, LogitcacheError where it cannot be reached.
    """
    opened = Cache.open(cache)
    if not len(opened):
        raise InputError(f"{cache} holds no traces yet; run `logitcache generate` first")
    written = (cache / CARD).exists() and _MARK not in (cache / CARD).read_text()
    api = _api(token)
    with _reaching(repo):
        url = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        where: dict[str, Any] = {"repo_id": url.repo_id, "repo_type": "dataset", "revision": revision}
        if revision:
            api.create_branch(url.repo_id, repo_type="dataset", branch=revision, exist_ok=True)
        _refuse_another(api, where, opened)
        # A shard without an index is what a crash left.
        whole = {index.name for index in opened.shards}
        left = [p for p in (cache / shard.DIRECTORY).glob("unit-*.arrow") if p.stem not in whole]
        message = f"{len(opened):,} traces of {opened.identity.teacher}"
        api.upload_folder(
            **where,
            folder_path=cache,
            allow_patterns=_FILES,
            ignore_patterns=[f"{shard.DIRECTORY}/{p.name}" for p in left] + [CARD] * (not written),
            delete_patterns=[f"{shard.DIRECTORY}/*"],
            commit_message=message,
        )
        if not written and _MARK in (_read(api, where, CARD) or _MARK):
            text = card(opened, url.repo_id).encode()
            api.upload_file(**where, path_or_fileobj=text, path_in_repo=CARD, commit_message=f"Card: {message}")
    return f"{url}/tree/{revision}" if revision else str(url)


def pull(
    repo: str, out: Path, *, token: str | None = None, revision: str | None = None, workers: int | None = None
) -> Path:
    """Brings the cache that ``repo`` holds to ``out``, and verifies it: every checksum, every trace.

    ``out`` appears once all of it is there and sound. Until then it lies in OUT.part, where the same command goes on.

    Args:
        out: a new directory.
        token: None takes the one of `hf auth login`.
        revision: a branch, a tag or a commit; None is main.
        workers: processes that verify; None takes the machine's cores.
    Raises: InputError where ``out`` holds something or the hub refuses, ShardCorruptError for a repository that is not
        sound, LogitcacheError where the hub cannot be reached.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} holds something already; give --out a new directory")
    api = _api(token)
    part, lock = out.with_name(out.name + ".part"), out.with_name(f".{out.name}.lock")
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
        if problems := verify(part, workers):
            shutil.rmtree(part)
            more = f", and {len(problems) - 1} more problems" if problems[1:] else ""
            raise ShardCorruptError(
                f"{repo}: {problems[0]}{more}; run the same command again, and push the cache again if it says the same"
            )
        shutil.rmtree(part / ".cache", ignore_errors=True)  # how far the download was
        part.rename(out)
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

The column `topk` holds the distributions, encoded; `logitcache export --to parquet` unpacks them to plain lists.

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


def _read(api: Any, where: dict[str, Any], name: str) -> str | None:
    """A small file of the repository; None where it has none."""
    if not api.file_exists(filename=name, **where):
        return None
    with tempfile.TemporaryDirectory() as directory:
        return Path(api.hf_hub_download(filename=name, local_dir=directory, **where)).read_text()


def _refuse_another(api: Any, where: dict[str, Any], cache: Cache) -> None:
    """Raises: IdentityError where the repository holds a cache of another identity."""
    text = _read(api, where, manifest.FILE_NAME)
    if text is None:
        return
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / manifest.FILE_NAME).write_text(text)
        there = manifest.read(Path(directory))
    if difference := manifest.first_difference(asdict(there), asdict(cache.identity)):
        name, theirs, ours = difference
        raise IdentityError(
            f"{where['repo_id']} holds a cache with {name} = {theirs!r}, {cache.path} has {ours!r}; give another repository"
        )


@contextlib.contextmanager
def _reaching(repo: str) -> Iterator[None]:
    """Errors of the hub, its client and the network between, said in one line."""
    try:
        yield
    except LogitcacheError:
        raise
    except Exception as e:  # whichever HTTP library this version of the client stands on
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise WriteError(f"{repo}: {first_line(e)}; free some space and run the same command again") from e
        status = getattr(getattr(e, "response", None), "status_code", None)
        if isinstance(e, ValueError) or status in (400, 401, 403, 404, 409, 422):
            way_out = "check the name, and `hf auth login` with a token that may do this"
            raise InputError(f"{repo}: the hub refuses ({first_line(e)}); {way_out}") from e
        raise LogitcacheError(
            f"{repo}: the hub cannot be reached ({first_line(e)}); check the network, HF_ENDPOINT and HF_HUB_OFFLINE, "
            "and run the same command again: it goes on where it was"
        ) from e
