"""First use without a network or with an incomplete checkpoint: an error names the missing file and how to get it,
or the ranking is that of the whole checkpoint."""

import shutil

import pandas as pd
import pytest
from conftest import GOLDEN, RERANKERS

from pyterrier_lit import CrossEncoder, PERank

FRAME = pd.DataFrame({"qid": "1", "query": "a cat", "docno": list("abc"), "text": ["a cat", "dogs", "cat"]})
FOLDERS = {name: (known.kind, known.random) for name, known in RERANKERS.items()}
FOLDERS |= {f"tiny {name}": (known.kind, known.tiny) for name, known in RERANKERS.items()}


def ranks(kind, folder):
    return kind(str(folder), device="cpu")(FRAME)["rank"].tolist()


@pytest.fixture
def encoder(tmp_path):
    """The encoder that the golden PE-Rank expects beside its folder."""
    shutil.copytree(GOLDEN / "pe_rank" / "encoder", tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.mark.parametrize("name", FOLDERS)
def test_a_missing_file_is_named_with_the_way_to_it_or_is_not_needed(name, tmp_path, encoder):
    kind, whole = FOLDERS[name]
    expected = ranks(kind, whole)
    for lost in sorted(whole.iterdir()):
        part = tmp_path / f"without-{lost.name}"
        shutil.copytree(whole, part, ignore=lambda *_, lost=lost: [lost.name])
        try:
            found = ranks(kind, part)
        except (FileNotFoundError, ValueError) as error:
            wanted = "FileNotFoundError" if "template" not in str(error) else "ValueError"
            assert type(error).__name__ == wanted
            assert lost.name in str(error) and str(part) in str(error)
            assert "template" in str(error) or "`hf download NAME --local-dir FOLDER`" in str(error)
        else:
            assert found == expected, lost.name


@pytest.mark.parametrize("kind", [CrossEncoder, PERank])
def test_a_folder_without_any_vocabulary_is_no_checkpoint(kind, tmp_path, encoder):
    _, whole = FOLDERS["CrossEncoder" if kind is CrossEncoder else "PERank"]
    shutil.copytree(whole, tmp_path / "part", ignore=shutil.ignore_patterns("vocab*", "tokenizer.json", "*.model"))
    with pytest.raises(
        FileNotFoundError, match=r"holds no tokenizer.json, vocab.txt or tokenizer.model, its vocabulary"
    ):
        ranks(kind, tmp_path / "part")


@pytest.mark.parametrize("kind", [known.kind for known in RERANKERS.values()])
def test_the_default_checkpoint_without_a_network_says_how_to_bring_it(kind):
    model = kind().model
    with pytest.raises(FileNotFoundError, match=rf"run `hf download {model} --local-dir FOLDER` .* path as model="):
        kind(device="cpu")(FRAME)


def test_the_encoder_of_a_pe_rank_without_a_network_says_where_it_belongs(tmp_path):
    shutil.copytree(GOLDEN / "pe_rank" / "checkpoint", tmp_path / "ranker")
    with pytest.raises(FileNotFoundError) as raised:
        ranks(PERank, tmp_path / "ranker")
    assert "run `hf download encoder --local-dir FOLDER`" in str(raised.value)
    assert f"put it at {tmp_path / 'ranker' / 'encoder'}, or give" in str(raised.value)
    shutil.copytree(GOLDEN / "pe_rank" / "encoder", tmp_path / "ranker" / "encoder")
    assert ranks(PERank, tmp_path / "ranker") == ranks(PERank, GOLDEN / "pe_rank" / "checkpoint")


def test_an_encoder_without_its_vocabulary_is_named(tmp_path, encoder):
    shutil.copytree(GOLDEN / "pe_rank" / "checkpoint", tmp_path / "ranker")
    (encoder / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"encoder holds no tokenizer.json, vocab.txt"):
        ranks(PERank, tmp_path / "ranker")
