import sys

import pytest

from logitcache.errors import PromptsError
from logitcache.prompts import load

datasets = pytest.importorskip("datasets")
USER = [[{"role": "user", "content": text}] for text in ("a", "b")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
        rows = datasets.Dataset.from_list([{"messages": m, "answer": [str(i)]} for i, m in enumerate(USER)])
        rows.save_to_disk(home / "saved")
        datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(home / "splits")
        (home / "repo" / "data").mkdir(parents=True)
        rows.to_parquet(home / "repo" / "data" / "train-00000-of-00001.parquet")
        rows.select([1]).to_parquet(home / "repo" / "data" / "test-00000-of-00001.parquet")
        patch.chdir(home)
        yield home


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("hf:saved", USER),
        ("saved", USER),
        ("hf:splits?split=test", USER[1:]),
        ("hf:splits?split=train", USER),
        ("hf:./repo?split=test", USER[1:]),
        ("hf:./repo?split=train[:1]", USER[:1]),
    ],
)
def test_a_split_of_a_dataset_is_a_source(home, source, found) -> None:
    prompts = load(source)
    assert [p.content for p in prompts] == found
    assert {p.answer for p in prompts} <= {"0", "1"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("splits", "hf:splits: has the splits train, test; choose one, such as hf:splits.split=train"),
        ("hf:splits?split=dev", "has the splits train, test; choose one"),
        ("hf:./repo", "has the splits train, test; choose one"),
        ("hf:./repo?split=dev", "cannot be loaded .ValueError: .*dev"),
        ("hf:./repo?splt=dev", "unknown option 'splt'; did you mean split"),
        ("hf:./repo?split", "cannot read the options; write hf:OWNER/NAME.split=train"),
        ("hf:./nowhere?split=train", "cannot be loaded"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_one_line(home, source, message) -> None:
    with pytest.raises(PromptsError, match=message) as error:
        load(source)
    assert "\n" not in str(error.value)


def test_without_the_library_the_way_out_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PromptsError, match=r"pip install 'logitcache\[datasets\]'"):
        load("hf:owner/name")
