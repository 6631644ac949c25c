"""The hub: which revision is read, and what is pushed. The tests run against a stand-in for the hub (hub.py)."""

import json

import pytest
from conftest import RERANKERS

from pyterrier_lit import CrossEncoder, PERank
from pyterrier_lit.files.rerankers import fingerprint
from pyterrier_lit.files.tirex import describe
from pyterrier_lit.models.hub import CARD

QUERY, PASSAGES = "water power", ["old mills", "light is measured", "rivers"]


def put(hub, name, folder, branch="main"):
    if name not in hub.repos:
        hub.create(name)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return hub.commit(name, branch, files, f"the files of {branch}")


@pytest.fixture
def two(hub, cross_encoder_folder):
    """The name of a repository with one cross-encoder on the branch "main" and another one on the branch "other", and
    the commit on the branch "other"."""
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


def test_the_encoder_of_a_pe_rank_is_read_from_its_main_branch_and_saved_along(hub, frame, tmp_path):
    checkpoint, encoder = RERANKERS["PERank"].golden, RERANKERS["PERank"].golden.parent / "encoder"
    put(hub, "someone/encoder", encoder)
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    config = json.loads(files["config.json"]) | {"encoder_name": "someone/encoder"}
    hub.create("someone/pe-rank")
    commit = hub.commit("someone/pe-rank", "v1", files | {"config.json": json.dumps(config).encode()}, "v1")
    reranker = PERank("someone/pe-rank", revision=commit, device="cpu")
    wanted = reranker(frame)
    assert wanted["docno"].tolist() == PERank(str(checkpoint), device="cpu")(frame)["docno"].tolist()
    reranker.save(tmp_path / "saved")
    hub.commit("someone/encoder", "main", {"config.json": b"broken"}, "broken")
    again = PERank(str(tmp_path / "saved"), device="cpu")
    assert again(frame)["docno"].tolist() == wanted["docno"].tolist()


def test_a_folder_has_no_revision(small):
    reranker = small(revision="main")
    with pytest.raises(ValueError, match=r"revision='main' is of a checkpoint on the hub, and model='.*' is a folder"):
        reranker.load()
    with pytest.raises(ValueError, match=r"revision=3; wanted the name of a branch"):
        small(revision=3).load()


def test_what_is_pushed_is_read_again_with_equal_scores(hub, small, tmp_path):
    reranker = small()
    wanted = reranker.rank(QUERY, PASSAGES)
    commit = reranker.push_to_hub("me/mine", private=True, commit_message="first", token="hf_secret")
    assert hub.repos["me/mine"]["private"] and hub.tokens == {"Bearer hf_secret"}
    assert hub.repos["me/mine"]["messages"][-1] == "first" and hub.at("me/mine")[0] == commit
    assert type(reranker)("me/mine", device="cpu").rank(QUERY, PASSAGES) == wanted
    assert type(reranker)("me/mine", revision=commit, device="cpu").rank(QUERY, PASSAGES) == wanted
    reranker.save(tmp_path / "mine")
    files = {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()}
    pushed = hub.at("me/mine")[1]
    assert pushed.keys() == files.keys()
    assert all(pushed[name] == files[name] for name in files if name != CARD)
    assert pushed[CARD].decode() == files[CARD].decode().replace("# mine", "# me/mine").replace('"mine"', '"me/mine"')


def test_a_branch_is_pushed_to_and_main_stays(two, hub, cross_encoder_folder):
    name, _ = two
    main = hub.at(name)
    reranker = CrossEncoder(str(cross_encoder_folder), device="cpu")
    commit = reranker.push_to_hub(name, revision="trial")
    assert hub.at(name) == main and hub.at(name, "trial")[0] == commit
    again = CrossEncoder(name, revision="trial", device="cpu")
    assert again.rank(QUERY, PASSAGES) == reranker.rank(QUERY, PASSAGES)


def test_another_layout_is_pushed_over_the_first_one_and_leaves_none_of_its_files(hub, cross_encoder_folder):
    reranker = CrossEncoder(str(cross_encoder_folder), device="cpu")
    hub.create("me/mine")
    hub.commit("me/mine", "main", {"pytorch_model.bin": b"old", "notes.txt": b"mine"}, "old")
    reranker.push_to_hub("me/mine", layout="transformers")
    files = hub.at("me/mine")[1]
    assert "pytorch_model.bin" not in files and files["notes.txt"] == b"mine"
    assert b"BertForSequenceClassification" in files["config.json"] or b"Electra" in files["config.json"]
    assert 'SentenceCrossEncoder("me/mine")' in files[CARD].decode()


def test_a_card_that_is_the_users_own_stays_on_the_hub_and_in_a_folder(hub, small, tmp_path):
    own = b"---\nlicense: mit\n---\nmy words"
    hub.create("me/mine")
    hub.commit("me/mine", "main", {CARD: own}, "mine")
    small().push_to_hub("me/mine")
    assert hub.at("me/mine")[1][CARD] == own
    (tmp_path / CARD).write_bytes(own)
    small().save(tmp_path)
    assert (tmp_path / CARD).read_bytes() == own


def test_a_push_that_fails_says_why_and_the_reranker_is_as_it_was(hub, small, monkeypatch):
    reranker = small()
    before = repr(reranker)
    monkeypatch.setattr(hub, "create", None)
    with pytest.raises(
        OSError, match=r"'me/mine' could not be pushed to the hub .*HF_TOKEN, by a token with write access"
    ):
        reranker.push_to_hub("me/mine")
    assert repr(reranker) == before
