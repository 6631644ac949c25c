"""The hub: which revision is read, and what is pushed there, against a stand-in that speaks its endpoints."""

import pytest
from conftest import RERANKERS

from pyterrier_lit import CrossEncoder
from pyterrier_lit.files.rerankers import fingerprint
from pyterrier_lit.files.tirex import describe

QUERY, PASSAGES = "water power", ["old mills", "light is measured", "rivers"]


def put(hub, name, folder, branch="main"):
    """The files of a folder as a commit of a repository; the commit's id."""
    if name not in hub.repos:
        hub.create(name)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return hub.commit(name, branch, files, f"the files of {branch}")


@pytest.fixture
def two(hub, cross_encoder_folder):
    """The name of a cross-encoder with another one on the branch "other", and that one's commit."""
    put(hub, "someone/reranker", RERANKERS["CrossEncoder"].random)
    return "someone/reranker", put(hub, "someone/reranker", cross_encoder_folder, "other")


def test_a_revision_is_what_is_read_of_config_weights_and_tokenizer(two, cross_encoder_folder):
    name, commit = two
    main, other = (
        CrossEncoder(str(folder), device="cpu").rank(QUERY, PASSAGES)
        for folder in (RERANKERS["CrossEncoder"].random, cross_encoder_folder)
    )
    assert main != other
    for revision, wanted in ((None, main), ("main", main), ("other", other), (commit, other)):
        assert CrossEncoder(name, revision=revision, device="cpu").rank(QUERY, PASSAGES) == wanted


def test_another_revision_is_read_again_and_two_revisions_are_two_rerankers(two):
    name, commit = two
    reranker = CrossEncoder(name, device="cpu")
    first, read = reranker.rank(QUERY, PASSAGES), fingerprint(reranker)
    reranker.revision = "other"
    assert reranker.in_memory() is None and reranker.rank(QUERY, PASSAGES) != first
    assert repr(reranker) == "CrossEncoder('someone/reranker', revision='other', device='cpu')"
    assert fingerprint(reranker) != read
    assert "revision='other'" in describe(reranker, None) and f"model: revision {commit}" in describe(reranker, None)


def test_a_backbone_has_its_revision(hub, electra, tmp_path):
    commit = put(hub, "someone/electra", electra)
    hub.commit("someone/electra", "main", {"config.json": b"broken"}, "broken")
    student = CrossEncoder.from_backbone("someone/electra", revision=commit, device="cpu")
    assert student.revision == commit and student.in_memory() is not None


def test_a_revision_that_is_not_there_is_named(two):
    with pytest.raises(FileNotFoundError, match=r"at revision 'v9' \(Rev.*hf download someone/reranker --revision v9"):
        CrossEncoder("someone/reranker", revision="v9", device="cpu").load()


def test_a_folder_has_no_revision(small):
    reranker = small(revision="main")
    with pytest.raises(ValueError, match=r"revision='main' is of a checkpoint on the hub, and model='.*' is a folder"):
        reranker.load()
    with pytest.raises(ValueError, match=r"revision=3; wanted the name of a branch"):
        small(revision=3).load()
