"""experiments/fetch.py, with a server on this machine: what it lists, downloads, resumes and refuses."""

import hashlib
import http.server
import json
import re
import threading
from types import SimpleNamespace

import fetch
import pandas as pd
import pytest

CONTENT = b"1 0 a 1\n" * 25_000
SIZE, CHECKSUM, CUT = len(CONTENT), f"sha256:{hashlib.sha256(CONTENT).hexdigest()}", 2**17


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves /run with byte ranges, /whole without byte ranges, /cut that breaks off, /record of Zenodo, and /page."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range")))
        host = f"http://127.0.0.1:{self.server.server_port}"
        checksum = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
        entry = {"key": "a.tar.gz", "size": len(CONTENT), "checksum": checksum, "links": {"self": f"{host}/run"}}
        body = json.dumps({"files": [entry]}).encode() if self.path == "/record" else CONTENT
        begin = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if self.path in ("/run", "/cut") else 0
        self.send_response(416 if begin >= len(body) else 206 if begin else 200)
        self.send_header("Content-Length", str(len(body) - begin))
        self.send_header("Content-Type", "text/html; charset=utf-8" if self.path == "/page" else "text/plain")
        self.end_headers()
        cut = self.path == "/cut" and not begin
        self.wfile.write(body[:CUT] if cut else body[begin:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def bring(server, tmp_path):
    """bring("run", ...): download this page of the server as runs/x.txt, and return the path of this file."""

    def bring(page, kind="file", size=SIZE, checksum=CHECKSUM):
        where = f"http://127.0.0.1:{server.server_port}/{page}"
        row = ("runs/x.txt", "trec_dl beir", kind, where, size, checksum)
        pd.DataFrame([row], columns=["name", "notebooks", "kind", "where", "bytes", "checksum"]).to_csv(
            tmp_path / "public.csv", index=False
        )
        fetch.main(["beir"], tmp_path / "public.csv", tmp_path / "data")
        return tmp_path / "data" / "runs" / "x.txt"

    return bring


def test_a_file_is_brought_once_and_checked(bring, server):
    assert bring("run").read_bytes() == CONTENT
    bring("run")
    assert server.asked == [("/run", None)]


@pytest.mark.parametrize("known", [SIZE, ""])
def test_a_download_goes_on_where_it_stopped(bring, server, tmp_path, known):
    part = tmp_path / "data" / "runs" / "x.txt.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:100])
    assert bring("run", size=known).read_bytes() == CONTENT and server.asked == [("/run", "bytes=100-")]
    assert not part.exists()


def test_a_broken_connection_keeps_what_came(bring, server):
    with pytest.raises(OSError):  # requests' ChunkedEncodingError
        bring("cut")
    assert bring("cut").read_bytes() == CONTENT and server.asked[1] == ("/cut", f"bytes={CUT}-")


def test_a_server_without_ranges_begins_anew(bring, tmp_path):
    (tmp_path / "data" / "runs").mkdir(parents=True)
    (tmp_path / "data" / "runs" / "x.txt.part").write_bytes(b"half")
    assert bring("whole").read_bytes() == CONTENT


def test_a_whole_part_of_unknown_size_is_done(bring, tmp_path):
    (tmp_path / "data" / "runs").mkdir(parents=True)
    (tmp_path / "data" / "runs" / "x.txt.part").write_bytes(CONTENT)
    assert bring("run", size="").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("change", "said"), [({"size": 5000}, "200,000 bytes came; wanted 5,000"), ({"checksum": "md5:0"}, "wanted 0")]
)
def test_another_file_than_was_wanted_is_refused(bring, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        bring("run", **change)
    assert not list((tmp_path / "data" / "runs").iterdir())


def test_a_web_page_in_place_of_a_file_is_refused_and_what_had_come_stays(bring, tmp_path):
    part = tmp_path / "data" / "runs" / "x.txt.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:100])
    with pytest.raises(ValueError, match=r"/page is a web page and no file; open it in a browser"):
        bring("page", size="", checksum="")
    assert [file.read_bytes() for file in part.parent.iterdir()] == [CONTENT[:100]]


def test_a_record_of_zenodo_brings_its_files(bring):
    folder = bring("record", kind="zenodo")
    assert (folder / "a.tar.gz").read_bytes() == CONTENT


def test_a_data_set_of_the_hub_and_tirex_come_by_their_own_clients(tmp_path, monkeypatch, capsys):
    info = SimpleNamespace(siblings=[SimpleNamespace(size=2**20), SimpleNamespace(size=None)])
    monkeypatch.setattr(fetch, "HfApi", lambda: SimpleNamespace(dataset_info=lambda *_, **__: info))
    asked = []
    monkeypatch.setattr(fetch, "snapshot_download", lambda *args, **kwargs: asked.append((args, kwargs)))
    fetch.hub(SimpleNamespace(where="a/b"), tmp_path)
    assert asked == [(("a/b",), {"repo_type": "dataset", "local_dir": tmp_path})]
    assert "2 files, 1.0 MB" in capsys.readouterr().out

    (tmp_path / "run.txt").write_text("1 Q0 a 1 1.0 x\n")
    monkeypatch.setattr("tira.rest_api_client.Client", lambda: SimpleNamespace(get_run_output=lambda *_: tmp_path))
    fetch.tirex(SimpleNamespace(where="team/software"), tmp_path / "tirex")
    assert len(list((tmp_path / "tirex").iterdir())) == 31 and (tmp_path / "tirex" / "vaswani.txt").exists()


def test_without_a_name_all_is_listed_and_nothing_brought(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "dl19.qrels.txt").touch()
    fetch.main([], data=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(pd.read_csv(fetch.HERE / "public.csv"))
    assert [line.split()[1] for line in lines[1:3]] == ["here", "missing"] and "trec_dl" in lines[1]
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        fetch.main(["dl19"])
    assert "dl19: wanted one of" in capsys.readouterr().err


def test_the_teacher_data_that_can_be_read_can_be_brought():
    sources = pd.read_csv(fetch.HERE / "public.csv", keep_default_na=False).set_index("name")
    page = (fetch.HERE.parent / "pyterrier_lit" / "pt_docs" / "training.rst").read_text(encoding="utf-8")
    named = re.findall(r"``((?:hub|rankgpt|zenodo)/[\w./-]+)``", page)
    assert len(named) == 6 and set(sources.loc[named, "notebooks"]) <= {"distillation", "trec_dl tirex distillation"}
    lists = sorted(name for name in sources.index if name.startswith("rankgpt/"))
    assert lists == [f"rankgpt/marco-train-{n}k{what}" for n in (100, 10) for what in ("-gpt3.5.json", ".jsonl")]


def test_every_source_is_of_a_known_kind_and_for_a_notebook():
    sources = pd.read_csv(fetch.HERE / "public.csv", keep_default_na=False)
    assert set(sources["kind"]) == set(fetch.KINDS) and sources["name"].is_unique
    notebooks = {path.stem for path in fetch.HERE.glob("*.ipynb")}
    assert {name for names in sources["notebooks"] for name in names.split()} <= notebooks
