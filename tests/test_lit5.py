"""models.lit5: tells LiT5-Distill (v1 or v2) from LiT5-Score checkpoints, and warns of queries that fill the prompt."""

import json
import shutil
import warnings

import pytest
from conftest import T5, TINY

from pyterrier_lit import LiT5Distill, LiT5Score
from pyterrier_lit.models.lit5 import family, named_kind, recorded_kind


def told(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return call(), [str(each.message) for each in caught if each.category is UserWarning]


@pytest.fixture
def at(tmp_path):
    """at(path): a LiT5 checkpoint in a folder with this path. Its config does not say which kind of LiT5 it is."""
    return lambda path: str(shutil.copytree(T5, tmp_path / path))


@pytest.mark.parametrize(
    "place, expected",
    [
        ("castorini/LiT5-Distill-base", "v1"),
        ("castorini/LiT5-Distill-xl-v2", "v2"),
        ("castorini/LiT5-Distill-base-v2-bf16", "v2"),
        ("/x/models--castorini--LiT5-Distill-base-v2/snapshots/0123abc", "v2"),
        ("/x/models--castorini--LiT5-Distill-base/snapshots/0123abc", "v1"),
        ("/x/lit5_distill_large_V2", "v2"),
        ("/x/LiT5-Distill-base/v2", "v2"),
        ("/v2/LiT5-Distill-base", "v1"),
        ("/archive-v2/models--castorini--LiT5-Distill-base/snapshots/0123abc", "v1"),
        ("/LiT5-Distill-base-v2/LiT5-Distill-large", "v1"),
        ("/x/LiT5-Distill-base-v20", "v1"),
        ("/x/LiT5-Distill-base-rev2", "v1"),
        ("/x/my-v2", "v2"),
        ("/v2/mine", None),
        ("/x/mine", None),
        ("", None),
    ],
)
def test_the_family_is_told_by_the_innermost_name(place, expected):
    assert family([place]) == expected


def test_the_first_place_that_tells_counts():
    assert family(["mine", "/x/LiT5-Distill-base-v2", "LiT5-Distill-base"]) == "v2"


@pytest.mark.parametrize(
    "name, size", [("models--castorini--LiT5-Distill-base-v2/snapshots/0123abc", 100), ("v2/LiT5-Distill-base", 20)]
)
def test_a_path_that_tells_gives_its_window_without_a_word(at, name, size):
    assert told(LiT5Distill(at(name), device="cpu").window) == ((size, size // 2), [])


def test_a_link_and_the_config_tell_too(at, tmp_path):
    (tmp_path / "mine").symlink_to(at("LiT5-Distill-base-v2"))
    assert told(LiT5Distill(str(tmp_path / "mine"), device="cpu").window) == ((100, 50), [])
    other = at("other")
    fields = json.loads((T5 / "config.json").read_text()) | {"_name_or_path": "castorini/LiT5-Distill-base-v2"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(fields))
    assert told(LiT5Distill(other, device="cpu").window) == ((100, 50), [])


def test_where_nothing_tells_one_warning_names_both_choices(at, frame):
    reranker = LiT5Distill(at("mine"), device="cpu")
    (_, said), (_, again) = told(lambda: reranker(frame)), told(lambda: reranker(frame))
    assert len(said) == 1 and not again
    assert "window_size=100" in said[0] and "window_size=20" in said[0] and "mine" in said[0]
    assert told(reranker.window) == ((20, 10), [])
    assert told(lambda: LiT5Distill(reranker.model, device="cpu", window_size=9)(frame))[1] == []
    assert told(lambda: LiT5Distill.from_backbone(reranker.model, device="cpu").window()) == ((20, 10), [])


def test_the_kind_is_recorded_on_save_and_the_other_reranker_refuses_it(tmp_path, frame):
    for kind, other in ((LiT5Distill, LiT5Score), (LiT5Score, LiT5Distill)):
        path = str(tmp_path / kind.__name__)
        kind.from_backbone(str(T5), device="cpu").save(path)
        assert recorded_kind(json.loads((tmp_path / kind.__name__ / "config.json").read_text())) == kind.__name__
        with pytest.raises(ValueError, match=rf"holds a checkpoint of {kind.__name__}, wanted one of {other.__name__}"):
            other(path, device="cpu")(frame)
        other.from_backbone(path, device="cpu").save(tmp_path / "on")  # as the error advises
        assert told(lambda other=other: other(str(tmp_path / "on"), device="cpu").load())[1] == []


def test_checkpoints_of_earlier_versions_are_told_by_their_settings(frame):
    for kind, folder in ((LiT5Score, "lit5-distill"), (LiT5Distill, "lit5-score")):
        with pytest.raises(ValueError, match="holds a checkpoint of"):
            kind(str(TINY / folder), device="cpu").load()
    assert recorded_kind({"lengths": {"max_length": 5}}) is None


def test_a_published_checkpoint_is_told_by_its_name(at, frame):
    hub = "models--castorini--LiT5-{}-base/snapshots/0123abc"
    for kind, name, named in ((LiT5Distill, "Score", "LiT5Score"), (LiT5Score, "Distill", "LiT5Distill")):
        said = told(lambda kind=kind, name=name: kind(at(hub.format(name)), device="cpu").load())[1]
        assert len(said) == 1 and f"is a checkpoint of {named} by its name" in said[0]
    assert named_kind("/lit5-score/LiT5-Distill-base-v2") == "LiT5Distill"
    assert named_kind("/fix-lit5/t5-base") is None


@pytest.mark.parametrize("kind", [LiT5Distill, LiT5Score])
def test_a_query_that_leaves_no_room_for_passages_is_named_once(kind, tmp_path):
    kind.from_backbone(str(T5), device="cpu", max_length=40).save(tmp_path)
    reranker = kind(str(tmp_path), device="cpu")
    passages, others = [f"passage {i}" for i in range(9)], [f"other {i}" for i in range(9)]
    ask = lambda queries, texts: told(lambda: reranker.score(queries, [texts] * len(queries)))  # noqa: E731
    scores, said = ask(["words " * 99, "a", "more " * 50], passages)
    assert len(said) == 1
    assert "'words words" in said[0] and "and 1 more queries" in said[0] and "max_length=40" in said[0]
    assert ask(["words " * 99], others)[0][0] == scores[0]
    assert ask(["a"], passages)[1] == []
    words = 1
    while not ask(["a " * words], passages)[1]:
        words += 1
    for n, reads in ((words - 1, True), (words, False)):  # the longest query without the warning, the shortest with it
        some, none = (getattr(ids, "ids", ids) for ids in (reranker.prompts("a " * n, [text]) for text in ("it", "")))
        assert (some != none) == reads
