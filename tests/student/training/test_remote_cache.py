"""Training and evaluating from a cache behind a URL."""

from logitcache.cache.reader import Cache
from logitcache.storage.location import Url
from logitcache.student.evaluation.evaluate_run import evaluate_run
from logitcache.student.evaluation.options import EvaluationOptions
from logitcache.student.training.run import train
from tests.cache.remote import upload
from tests.storage.fixtures import s3, s3_server  # noqa: F401


def test_a_run_is_the_same_from_a_url_and_resumes_there(s3, home, options, tmp_path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("LOGITCACHE_CACHE_DIR", str(tmp_path / "mirrors"))
    upload(home / "cache", url := s3.url())
    here = train(options("here"))
    there = train(options("there", caches=[url]))
    assert there.eval_after == here.eval_after
    assert train(options("here", caches=[url])).again  # what a cache has counts, not where it is
    student = str(tmp_path / "there")
    mine, theirs = (
        evaluate_run(EvaluationOptions(cache=cache, student=student)) for cache in (url, str(home / "cache"))
    )
    assert (mine.cache, mine.found) == (url, theirs.found)
    assert Cache.open(url).location == Url(url)
