"""Push and pull against a stand-in of the hub's file API on the loopback, through the real client."""

import functools
import hashlib
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from logitcache.cache import manifest
from logitcache.cache.reader import Cache
from logitcache.errors import IdentityError, InputError, LogitcacheError, NotACacheError, ShardCorruptError, WriteError
from logitcache.interop import hub as module
from logitcache.interop.hub import PullReport, PushReport, _reaching, card, pull
from tests import tiny
from tests.cache.remote import upload
from tests.interop.hub_server import TOKEN, ask
from tests.storage.fixtures import s3, s3_server  # noqa: F401

pytest.importorskip("huggingface_hub")
push = functools.partial(module.push, workers=1)


@pytest.fixture
def cache(tmp_path) -> Cache:
    return tiny.write_cache(tmp_path / "cache")


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_what_was_pushed_is_pulled_byte_for_byte(hub, cache, tmp_path) -> None:
    (cache.path / ".lock").unlink()
    before = contents(cache.path)
    assert push(cache.path, "me/traces", token=TOKEN) == PushReport(f"{hub.url}/datasets/me/traces", 24)
    assert hub.private == {"me/traces": True}
    report = pull("me/traces", tmp_path / "out", token=TOKEN, workers=1)
    assert report == PullReport(tmp_path / "out", hub.tree("me/traces", "main")[0], 24)
    assert contents(cache.path) == before  # the card was made for the repository alone
    before.pop(manifest.BACKUP)  # the hub has versions instead of second copies
    assert contents(tmp_path / "out") == before | {"README.md": card(cache, "me/traces").encode()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "out"]


@pytest.mark.slow
def test_a_cache_in_an_object_store_is_pushed_byte_for_byte(hub, s3, cache, tmp_path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("LOGITCACHE_CACHE_DIR", str(tmp_path / "mirrors"))
    monkeypatch.setenv("LOGITCACHE_CACHE_BYTES", "1")  # one shard at a time
    upload(cache.path, url := s3.url())
    assert push(url, "me/traces", token=TOKEN).traces == 24
    sent = hub.tree("me/traces", "main")[1]
    mine = {n: d for n, d in contents(cache.path).items() if n.startswith("shards/") or n == manifest.FILE_NAME}
    assert {name: sent[name] for name in mine} == mine
    assert not list((tmp_path / "mirrors").glob("*-copy"))


@pytest.mark.slow
def test_only_the_cache_itself_is_pushed(hub, cache) -> None:
    for name in (
        ".lock",
        "logs/engine.log",
        "set-aside/unit-000009.arrow",
        "shards/.unit-000007.arrow.logitcache-part",
        "shards/unit-000007.arrow.part",
    ):
        (cache.path / name).parent.mkdir(exist_ok=True)
        (cache.path / name).write_bytes(b"x")
    (cache.path / "shards" / "unit-000008.arrow").write_bytes(b"a crash left this without an index")
    push(cache.path, "me/traces", token=TOKEN)
    assert set(hub.tree("me/traces", "main")[1]) == {
        *(".gitattributes", "manifest.json", "README.md"),
        *(f"shards/unit-00000{i}.{s}" for i in (0, 1) for s in ("arrow", "json")),
    }


@pytest.mark.slow
def test_pushing_again_sends_what_changed_and_drops_what_is_gone(hub, cache) -> None:
    push(cache.path, "me/traces", token=TOKEN)
    hub.sent.clear()
    shutil.copy(cache.path / "shards" / "unit-000001.arrow", cache.path / "shards" / "unit-000005.arrow")
    shutil.copy(cache.path / "shards" / "unit-000001.json", cache.path / "shards" / "unit-000005.json")
    index = cache.path / "shards" / "unit-000005.json"
    text = index.read_text().replace("unit-000001", "unit-000005")
    body = text[: text.rindex(' "check"')]
    index.write_text(f'{body} "check": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n')
    for suffix in (".arrow", ".json"):
        (cache.path / "shards" / f"unit-000001{suffix}").unlink()
    push(cache.path, "me/traces", token=TOKEN)
    assert {p for p in hub.sent if p.startswith("shards/")} == {"shards/unit-000005.arrow", "shards/unit-000005.json"}
    assert not any("unit-000001" in path for path in hub.tree("me/traces", "main")[1])


@pytest.mark.slow
def test_a_revision_is_a_branch_of_its_own(hub, cache, tmp_path) -> None:
    push(cache.path, "me/traces", token=TOKEN)
    (cache.path / "README.md").write_text("mine")
    assert push(cache.path, "me/traces", token=TOKEN, revision="v2").url.endswith("/me/traces/tree/v2")
    pull("me/traces", tmp_path / "v2", token=TOKEN, revision="v2", workers=1)
    assert (tmp_path / "v2" / "README.md").read_text() == "mine"
    assert hub.tree("me/traces", "main")[1]["README.md"] != b"mine"


@pytest.mark.slow
def test_a_card_that_someone_wrote_is_kept_and_ours_is_made_anew(hub, cache, tmp_path) -> None:
    push(cache.path, "me/traces", token=TOKEN)
    pull("me/traces", tmp_path / "out", token=TOKEN, workers=1)
    push(tmp_path / "out", "me/copy", token=TOKEN)
    assert hub.tree("me/copy", "main")[1]["README.md"] == card(cache, "me/copy").encode()
    hub.repos["me/copy"]["main"][-1]["README.md"] = b"written on the hub"
    push(tmp_path / "out", "me/copy", token=TOKEN)
    assert hub.tree("me/copy", "main")[1]["README.md"] == b"written on the hub"


@pytest.mark.slow
def test_a_repository_of_another_cache_is_refused(hub, cache, tmp_path) -> None:
    push(cache.path, "me/traces", token=TOKEN)
    shutil.copytree(cache.path, tmp_path / "other")
    manifest.write(tmp_path / "other", replace(tiny.identity(), teacher="another"))
    with pytest.raises(IdentityError, match="me/traces holds a cache with teacher = 'tiny', .* has 'another'"):
        push(tmp_path / "other", "me/traces", token=TOKEN)


@pytest.mark.slow
def test_a_shard_that_was_damaged_on_the_hub_is_not_pulled(hub, cache, tmp_path) -> None:
    push(cache.path, "me/traces", token=TOKEN)
    tree = hub.repos["me/traces"]["main"][-1]
    tree["shards/unit-000001.arrow"] = tree["shards/unit-000001.arrow"][:-1] + b"x"
    with pytest.raises(ShardCorruptError, match="me/traces: unit-000001: .* checksum"):
        pull("me/traces", tmp_path / "out", token=TOKEN, workers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.logitcache-part", "cache"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.json", "shards/unit-000001.arrow"])
def test_what_was_damaged_on_the_way_is_fetched_again_and_nothing_else(hub, cache, tmp_path, monkeypatch, name) -> None:
    push(cache.path, "me/traces", token=TOKEN)
    from huggingface_hub import HfApi

    download = HfApi.snapshot_download

    def damage(self, repo, **options):
        download(self, repo, **options)
        path = Path(options["local_dir"]) / name
        path.write_bytes(path.read_bytes()[:-1] + b"x")

    monkeypatch.setattr(HfApi, "snapshot_download", damage)
    with pytest.raises(ShardCorruptError, match=f"me/traces: {Path(name).stem}.*; run the same command again"):
        pull("me/traces", tmp_path / "out", token=TOKEN, workers=1)
    monkeypatch.setattr(HfApi, "snapshot_download", download)
    hub.read.clear()
    pull("me/traces", tmp_path / "out", token=TOKEN, workers=1)
    shard = ["shards/unit-000001.arrow", "shards/unit-000001.json"]
    assert sorted(hub.read) == (["manifest.json"] if name == "manifest.json" else shard)
    assert [t.trace_id for t in Cache.open(tmp_path / "out")] == cache.trace_ids


@pytest.mark.slow
def test_a_shard_that_is_finished_during_a_push_waits_for_the_next(hub, cache, monkeypatch) -> None:
    def late(*_) -> None:
        for suffix in (".arrow", ".json"):
            shutil.copy(cache.path / f"shards/unit-000000{suffix}", cache.path / f"shards/unit-000002{suffix}")

    monkeypatch.setattr(module, "_refuse_another", late)
    push(cache.path, "me/traces", token=TOKEN)
    assert not any("unit-000002" in path for path in hub.tree("me/traces", "main")[1])


@pytest.mark.slow
@pytest.mark.parametrize(("public", "message"), [(False, "is private; omit"), (True, "is public; give")])
def test_a_repository_that_others_see_otherwise_than_asked_is_refused(hub, cache, public, message) -> None:
    push(cache.path, "me/traces", token=TOKEN, public=public)
    hub.sent.clear()
    with pytest.raises(InputError, match=f"me/traces {message} `public`"):
        push(cache.path, "me/traces", token=TOKEN, public=not public)
    assert hub.sent == []


@pytest.mark.slow
def test_a_damaged_manifest_on_the_hub_is_named_by_its_repository(hub, cache, tmp_path) -> None:
    push(cache.path, "me/traces", token=TOKEN)
    tree = hub.repos["me/traces"]["main"][-1]
    tree["manifest.json"] = tree["manifest.json"][:-1] + b"\xff"
    with pytest.raises(ShardCorruptError, match="^me/traces/manifest.json: does not match its checksum"):
        push(cache.path, "me/traces", token=TOKEN)
    with pytest.raises(ShardCorruptError, match="^me/traces: manifest.json: does not match its checksum"):
        pull("me/traces", tmp_path / "out", token=TOKEN, workers=1)


@pytest.mark.slow
def test_a_card_that_is_no_utf8_is_kept_there_and_refused_here(hub, cache) -> None:
    push(cache.path, "me/traces", token=TOKEN)
    hub.repos["me/traces"]["main"][-1]["README.md"] = b"\xff mine"
    push(cache.path, "me/traces", token=TOKEN)
    assert hub.tree("me/traces", "main")[1]["README.md"] == b"\xff mine"
    (cache.path / "README.md").write_bytes(b"\xff here")
    with pytest.raises(InputError, match="README.md: a dataset card must be UTF-8; convert it"):
        push(cache.path, "me/traces", token=TOKEN)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (PermissionError(13, "Permission denied", "/x"), WriteError, "cannot write to this disk .*; fix the cause"),
        (OSError(28, "No space left on device"), WriteError, "cannot write to this disk .*; free some space"),
        (json.JSONDecodeError("Expecting value", "<html>", 0), LogitcacheError, "cannot be reached"),
        (ConnectionResetError(104, "Connection reset by peer"), LogitcacheError, "cannot be reached"),
    ],
)
def test_errors_of_this_machine_are_not_blamed_on_the_network(error, kind, said) -> None:
    with pytest.raises(kind, match=f"me/traces: .*{said}") as raised, _reaching("me/traces"):
        raise error
    assert type(raised.value) is kind


@pytest.mark.slow
def test_a_pull_that_broke_off_goes_on_and_keeps_nothing_old(hub, cache, tmp_path, monkeypatch) -> None:
    push(cache.path, "me/traces", token=TOKEN)
    from huggingface_hub import HfApi

    download = HfApi.snapshot_download

    def half(self, repo, **options):
        download(self, repo, **options | {"allow_patterns": ["manifest.json", "shards/unit-000000.*"]})
        raise ConnectionResetError("the line is cut")

    monkeypatch.setattr(HfApi, "snapshot_download", half)
    with pytest.raises(LogitcacheError, match="me/traces: the hub cannot be reached .*the line is cut"):
        pull("me/traces", tmp_path / "out", token=TOKEN, workers=1)
    assert not (tmp_path / "out").exists()
    (tmp_path / ".out.logitcache-part" / "content" / "shards" / "unit-000099.json").write_text("of an older state")
    monkeypatch.setattr(HfApi, "snapshot_download", download)
    hub.read.clear()
    pull("me/traces", tmp_path / "out", token=TOKEN, workers=1)
    assert sorted(hub.read) == ["README.md", "shards/unit-000001.arrow", "shards/unit-000001.json"]
    assert [t.trace_id for t in Cache.open(tmp_path / "out")] == cache.trace_ids


@pytest.mark.slow
def test_a_wrong_token_is_refused_with_the_way_out(hub, cache, tmp_path) -> None:
    with pytest.raises(InputError, match="me/traces: the hub refuses .*hf auth login"):
        push(cache.path, "me/traces", token="hf_wrong")
    with pytest.raises(InputError, match="me/traces: the hub refuses .*hf auth login"):
        pull("me/traces", tmp_path / "out", token="hf_wrong")


@pytest.mark.slow
def test_a_repository_that_is_none_or_no_cache_is_refused(hub, tmp_path) -> None:
    with pytest.raises(InputError, match="me/nothing: the hub refuses"):
        pull("me/nothing", tmp_path / "out", token=TOKEN)
    hub.repos["me/other"] = {"main": [{"data.csv": b""}]}
    with pytest.raises(InputError, match="me/other: no manifest.json in it"):
        pull("me/other", tmp_path / "out", token=TOKEN)
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_cannot_be_reached_is_reported_in_one_line(cache, tmp_path, monkeypatch) -> None:
    ask(monkeypatch, "http://127.0.0.1:9")
    for verb in (lambda: push(cache.path, "me/traces", token=TOKEN), lambda: pull("me/traces", tmp_path / "o")):
        with pytest.raises(LogitcacheError, match="me/traces: the hub cannot be reached .*HF_ENDPOINT") as raised:
            verb()
        assert "\n" not in str(raised.value)


def test_what_is_not_a_cache_and_what_exists_already_are_refused_before_the_hub_is_asked(cache, tmp_path) -> None:
    with pytest.raises(NotACacheError):
        push(tmp_path, "me/traces")
    manifest.write(tmp_path, tiny.identity())
    with pytest.raises(InputError, match="has no traces yet"):
        push(tmp_path, "me/traces")
    with pytest.raises(InputError, match="is not an empty directory"):
        pull("me/traces", cache.path)


def test_the_card_opens_the_shards_and_says_what_they_are(cache) -> None:
    text = card(cache, "me/traces")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "shards/*.arrow"}]
    assert front["size_categories"] == ["n<1K"]
    assert "license" not in front
    info = cache.info()
    for said in (
        "me/traces",
        "24 of 12 prompts",
        f"{info.rows:,}",
        '| tokenizer_hash | `"',
        "temperature 1.0",
    ):
        assert said in text


@pytest.mark.parametrize(
    "evil",
    [
        'a"\nlicense: mit\nx: "',
        "---\n# heading",
        "a: &a [*a]",
        "`` ` | <img src=x onerror=alert(1)> | [x](javascript:alert(1)) ![x](http://evil/x.png)",
        "\x1b[2J\u202e\u200b\x7f\x85",
        "<!-- --> ```sh\nrm -rf ~\n```",
    ],
)
def test_a_card_shows_a_stranger_s_words_and_obeys_none(tmp_path, evil) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})

    def shape(text: str) -> list[str]:
        tokens = [*parser.parse(text), *(child for t in parser.parse(text) for child in t.children or ())]
        return [t.type for t in tokens if t.type not in ("text", "text_special")]

    fields = {"teacher_revision": evil, "engine": evil, "sampling": {evil: evil}, "derived": [evil], "dtype": evil}
    texts = [
        card(tiny.write_cache(tmp_path / name, **dict.fromkeys(["teacher"], word), **more))
        for name, word, more in (
            ("evil", evil, fields),
            ("good", "good", {n: {"a": "b"} if n == "sampling" else ["c"] if n == "derived" else "d" for n in fields}),
        )
    ]
    heads, bodies = zip(*(text.removeprefix("---\n").split("\n---\n", 1) for text in texts), strict=True)
    found, good = map(yaml.safe_load, heads)
    assert found | {"pretty_name": ""} == good | {"pretty_name": ""}
    assert shape(bodies[0]) == shape(bodies[1])
    assert all(line.isprintable() for line in texts[0].split("\n"))


@pytest.mark.parametrize("name", ["README.md", "manifest.json", "shards/unit-000001.arrow", "shards/unit-000001.json"])
def test_a_link_in_a_cache_is_not_pushed(hub, cache, tmp_path, name) -> None:
    (tmp_path / "key").write_text("a secret key")
    path = cache.path / name
    if path.exists():
        path.rename(tmp_path / "key")
    path.symlink_to(tmp_path / "key")
    with pytest.raises((LogitcacheError, OSError), match=re.escape(path.name.partition(".")[0])):
        push(cache.path, "me/traces", token=TOKEN)
    assert hub.sent == []


def test_a_card_that_is_a_fifo_is_refused(hub, cache) -> None:
    os.mkfifo(cache.path / "README.md")
    with pytest.raises(InputError, match=r"README\.md: is not a regular file; put the card itself there"):
        push(cache.path, "me/traces", token=TOKEN)
    assert hub.sent == []


def test_a_pull_spares_what_is_the_user_s(hub, cache, tmp_path) -> None:
    push(cache.path, "me/traces", token=TOKEN)
    (tmp_path / "out.part" / "shards").mkdir(parents=True)
    (tmp_path / "out.part" / "shards" / "unit-000099.json").write_text("mine")
    (tmp_path / "out.part" / "manifest.json").write_text("mine")
    (tmp_path / ".out.lock").write_text("mine")
    before = contents(tmp_path)
    pull("me/traces", tmp_path / "out", token=TOKEN, workers=1)
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith("out/")} == before
    (tmp_path / ".two.logitcache-part").mkdir()
    (tmp_path / ".two.logitcache-part" / "manifest.json").write_text("mine")
    with pytest.raises(WriteError, match=r"\.two\.logitcache-part.*move it away"):
        pull("me/traces", tmp_path / "two", token=TOKEN, workers=1)
    assert (tmp_path / ".two.logitcache-part" / "manifest.json").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["shards/unit-1/../../../evil.json", "shards/unit-x\x1b[2J.arrow", "shards\\unit-.json"]
)
def test_a_file_name_that_no_push_gives_is_not_downloaded(hub, cache, tmp_path, name) -> None:
    push(cache.path, "me/traces", token=TOKEN)
    hub.repos["me/traces"]["main"][-1][name] = b"evil"
    hub.read.clear()
    with pytest.raises(ShardCorruptError, match="me/traces: .* is not a file of a cache"):
        pull("me/traces", tmp_path / "out", token=TOKEN, workers=1)
    assert hub.read == []
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
