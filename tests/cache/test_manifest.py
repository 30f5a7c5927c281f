import dataclasses
import json
from pathlib import Path

import pytest

from logitcache.cache import manifest
from logitcache.errors import FormatVersionError, IdentityError, NotACacheError, ShardCorruptError
from logitcache.identity import Identity, tokenizer_hash, weights_fingerprint
from logitcache.runtime.files import publish_json

IDENTITY = Identity(
    teacher="org/teacher",
    teacher_revision="abc",
    tokenizer_hash="t",
    chat_template_hash=None,
    vocab_size=1000,
    top_k=64,
    top_p=None,
    min_k=1,
    prompt_logits=False,
    sampling={"temperature": 1.0, "max_tokens": 100, "seed": 0},
    reasoning_markers=["<think>", "</think>"],
    answer_regex=None,
    dtype="bfloat16",
    engine="vllm 0",
    engine_args={},
)


def test_the_same_identity_is_taken_again(tmp_path: Path) -> None:
    manifest.create_or_match(tmp_path / "c", IDENTITY)
    manifest.create_or_match(tmp_path / "c", IDENTITY)
    assert manifest.read(tmp_path / "c") == IDENTITY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 32}, r"made with top_k = 64, this run has 32; use the same `top_k`, or give `out` a new directory"),
        (
            {"sampling": {"temperature": 0.6, "max_tokens": 100, "seed": 0}},
            r"sampling.temperature = 1.0, this run has 0.6",
        ),
        ({"engine": "vllm 1"}, r"engine = 'vllm 0', this run has 'vllm 1'; use what it was made with"),
        ({"engine_args": {"quantization": "fp8"}}, r"engine_args.quantization = None, this run has 'fp8'"),
        ({"tokenizer_hash": "u"}, r"tokenizer_hash = 't', this run has 'u'"),
    ],
)
def test_a_changed_identity_is_refused_with_field_values_and_way_out(tmp_path: Path, change, message) -> None:
    manifest.create_or_match(tmp_path / "c", IDENTITY)
    before = (tmp_path / "c" / manifest.FILE_NAME).read_bytes()
    with pytest.raises(IdentityError, match=message):
        manifest.create_or_match(tmp_path / "c", dataclasses.replace(IDENTITY, **change))
    assert (tmp_path / "c" / manifest.FILE_NAME).read_bytes() == before


def test_a_directory_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(NotACacheError, match="is not a cache; give `out` an empty or new directory"):
        manifest.create_or_match(tmp_path, IDENTITY)
    with pytest.raises(NotACacheError, match=r"no manifest\.json in it"):
        manifest.read(tmp_path)
    with pytest.raises(NotACacheError, match="no such directory"):
        manifest.read(tmp_path / "nowhere")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_run_without_a_manifest_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in (".lock", ".manifest.json.logitcache-part"):
        (tmp_path / name).touch()
    assert manifest.match(tmp_path, IDENTITY) is None
    assert manifest.create_or_match(tmp_path, IDENTITY) == IDENTITY


def test_a_setting_of_null_differs_from_none_at_all(tmp_path: Path) -> None:
    manifest.create_or_match(tmp_path / "c", dataclasses.replace(IDENTITY, engine_args={"quantization": None}))
    with pytest.raises(IdentityError, match="engine_args.quantization = None, this run has None"):
        manifest.create_or_match(tmp_path / "c", IDENTITY)


def test_a_newer_format_is_refused_by_its_version(tmp_path: Path) -> None:
    publish_json(tmp_path / manifest.FILE_NAME, {"format": 99, "surprise": 1})
    with pytest.raises(FormatVersionError, match=r"format version 99.*reads 1; upgrade"):
        manifest.read(tmp_path)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    manifest.create_or_match(tmp_path / "c", IDENTITY)
    path = tmp_path / "c" / manifest.FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(ShardCorruptError, match=r"manifest\.json"):
        manifest.read(tmp_path / "c")


def test_trace_ids_differ_by_prompt_content_sample_and_identity_and_by_nothing_else() -> None:
    other = dataclasses.replace(IDENTITY, sampling={"temperature": 1.0, "max_tokens": 100, "seed": 1})
    ids = {
        IDENTITY.trace_id("p", "d", 0),
        IDENTITY.trace_id("q", "d", 0),
        IDENTITY.trace_id("p", "e", 0),
        IDENTITY.trace_id("p", "d", 1),
        other.trace_id("p", "d", 0),
    }
    assert len(ids) == 5
    # Of `printf "%s\0p\0d\0000" DIGEST | b2sum -l 128`, with the digest that the test below expects.
    assert IDENTITY.trace_id("p", "d", 0) == "7e6a1c2f35042c45b67badde790aa856"
    assert all(len(i) == 32 for i in ids)


def test_the_digest_of_an_identity_on_disk_is_the_specified_hash(tmp_path: Path) -> None:
    """The digest is that of b2sum -l 128 for {"dtype":"bfloat16","engine":"vllm 0","min_k":1,"reasoning_markers":
    ["<think>","</think>"],"sampling":{"max_tokens":100,"seed":0,"temperature":1},"teacher":"org/teacher",
    "teacher_revision":"abc","tokenizer_hash":"t","top_k":64,"vocab_size":1000} on one line."""
    manifest.create_or_match(tmp_path / "c", IDENTITY)
    assert manifest.read(tmp_path / "c").digest == "cb0d31539c178f587606c0ff0ac26c43"


def test_tokenizers_with_one_vocabulary_and_other_splitting_hash_apart() -> None:
    class Fake:
        def __init__(self, ids):
            self.ids = ids

        def get_vocab(self):
            return {"a": 0, "b": 1}

        def __call__(self, text, add_special_tokens):
            return {"input_ids": self.ids}

    assert tokenizer_hash(Fake([0, 1])) == tokenizer_hash(Fake([0, 1]))
    assert tokenizer_hash(Fake([0, 1])) != tokenizer_hash(Fake([1, 0]))


def test_a_weight_fingerprint_sees_a_changed_byte_and_not_the_folders_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(200_000))
    first = weights_fingerprint(tmp_path / "a")
    assert first == weights_fingerprint(tmp_path / "b")
    data = bytearray(200_000)
    data[150_001] = 1
    (tmp_path / "b" / "model.safetensors").write_bytes(data)
    assert first != weights_fingerprint(tmp_path / "b")
