import pytest

from mara_rl.common.errors import DataError
from mara_rl.evaluation.score_cache import ScoreCache


def test_scores_outlive_the_cache_and_differ_by_model_and_text(tmp_path):
    path = tmp_path / "cache" / "scores.sqlite"
    pairs = {("p", f"answer {i}"): i / 7 for i in range(1200)}
    with ScoreCache(path) as cache:
        cache.put("one", pairs)
        cache.put("two", {("p", "answer 0"): -1.0})
    with ScoreCache(path) as cache:
        assert cache.get("one", pairs) == pairs
        assert cache.get("two", pairs) == {("p", "answer 0"): -1.0}
        # Nothing depends on where one text ends and the next begins.
        assert cache.get("one", [("pa", "nswer 0"), ("", "panswer 0")]) == {}


def test_a_file_that_is_no_cache_is_named(tmp_path):
    path = tmp_path / "scores.sqlite"
    path.write_text("not a database, " * 100)
    with pytest.raises(DataError, match=r"scores.sqlite: .*remove it to begin anew"):
        ScoreCache(path)
