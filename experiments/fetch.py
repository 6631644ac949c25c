"""What the notebooks can use and the repository may not hold: lists it, and brings it into experiments/data.

python experiments/fetch.py                      lists what is missing, for which notebook, how large; brings nothing
python experiments/fetch.py trec_dl beir         all that these notebooks can use
python experiments/fetch.py runs/dl22.qrels.txt  one of them

public.csv says where each lies: a file, the files of a record of Zenodo, a data set on the hub, or the first stage of
TIREx's tasks. A download that was stopped goes on where it stopped, and is kept only if its checksum, where one is
known, is right. Archives are left packed; put runs out of them into data/runs by the names in public_runs.py.
"""

import argparse
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pandas as pd
import requests
from huggingface_hub import HfApi, snapshot_download
from papers import TASKS
from tqdm import tqdm

HERE = Path(__file__).parent


class File(NamedTuple):
    """A file to download. size: bytes, 0 where it is not known. checksum: ALGORITHM:DIGEST, or nothing."""

    path: Path
    url: str
    size: int = 0
    checksum: str = ""


def main(arguments: list[str] | None = None, table: Path = HERE / "public.csv", data: Path = HERE / "data") -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", nargs="*", metavar="NOTEBOOK or NAME")
    wanted = parser.parse_args(arguments).wanted
    sources = pd.read_csv(table, keep_default_na=False).astype(str)
    known = {*sources["name"], *" ".join(sources["notebooks"]).split()}
    if unknown := set(wanted) - known:
        parser.error(f"{', '.join(sorted(unknown))}: wanted one of {', '.join(sorted(known))}")
    if not wanted:
        print(listing(sources, data).to_string(index=False))
        return
    for source in sources.itertuples():
        if {source.name, *source.notebooks.split()} & set(wanted):
            print(source.name, flush=True)
            KINDS[source.kind](source, data / source.name)


def listing(sources: pd.DataFrame, data: Path) -> pd.DataFrame:
    """A row per source: is it here, or what of it was brought; its notebooks; its size where it is known."""
    states = ["here" if (data / name).exists() else "missing" for name in sources["name"]]
    sizes = [f"{int(size) / 2**20:.1f} MB" if size else "asked when fetched" for size in sources["bytes"]]
    return pd.DataFrame({"name": sources["name"], "state": states, "notebooks": sources["notebooks"], "size": sizes})


def file(source: tuple, path: Path) -> None:
    """One file at an address."""
    download(File(path, source.where, int(source.bytes or 0), source.checksum))


def zenodo(source: tuple, folder: Path) -> None:
    """All files of a record; Zenodo says their sizes and checksums."""
    record = requests.get(source.where, timeout=60)
    record.raise_for_status()
    for entry in record.json()["files"]:
        download(File(folder / entry["key"], entry["links"]["self"], entry["size"], entry["checksum"]))


def hub(source: tuple, folder: Path) -> None:
    """A data set on the hub, by its own client, which resumes and checks."""
    files = HfApi().dataset_info(source.where, files_metadata=True).siblings
    print(f"{len(files)} files, {sum(entry.size or 0 for entry in files) / 2**20:.1f} MB")
    snapshot_download(source.where, repo_type="dataset", local_dir=folder)


def tirex(source: tuple, folder: Path) -> None:
    """The first stage of TIREx's tasks, by TIRA's client, which keeps what it has."""
    from tira.rest_api_client import Client

    client = Client()
    for task in TASKS["ir_datasets_id"]:
        path = folder / f"{task.replace('/', '-')}.txt"
        if not path.exists():
            found = Path(client.get_run_output(source.where, task)) / "run.txt"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, path)


KINDS = {"file": file, "zenodo": zenodo, "hub": hub, "tirex": tirex}


def download(wanted: File) -> None:
    """Bring a file, or the rest of it. ValueError where its size or checksum is another, or a web page came; it is then
    left out."""
    if wanted.path.exists():
        return
    part = wanted.path.with_name(f"{wanted.path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    if not wanted.size or have < wanted.size:
        with open(part, "ab") as out:
            for chunk in received(wanted, have):
                if chunk is None:  # the server begins anew
                    out.truncate(0)
                else:
                    out.write(chunk)
    if said := wrong(part, wanted):
        part.unlink()
        raise ValueError(f"{wanted.url}: {said}; nothing was kept. Try again, or see whether public.csv is out of date")
    part.replace(wanted.path)


def received(wanted: File, have: int) -> Iterator[bytes | None]:
    """The bytes after the first `have`; None before them where they are all bytes instead."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    address = quote(wanted.url, safe=":/?&=%")
    with requests.get(address, headers=headers, stream=True, timeout=60) as response:
        if have and response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # it was whole
        response.raise_for_status()
        if response.headers.get("Content-Type", "").startswith("text/html"):  # asks to log in, or whether one is sure
            raise ValueError(f"{wanted.url} gave a web page and no file; open it in a browser, and put the file there")
        if have and response.status_code != requests.codes.partial_content:
            yield None
            have = 0
        with tqdm(total=wanted.size or None, initial=have, unit="B", unit_scale=True, desc=wanted.path.name) as bar:
            for chunk in response.iter_content(2**16):
                yield chunk
                bar.update(len(chunk))


def wrong(path: Path, wanted: File) -> str:
    """What is wrong with a downloaded file, or nothing."""
    size = path.stat().st_size
    if wanted.size and size != wanted.size:
        return f"{size:,} bytes came; wanted {wanted.size:,}"
    algorithm, _, digest = wanted.checksum.partition(":")
    if not digest:
        return ""
    with open(path, "rb") as content:
        found = hashlib.file_digest(content, algorithm).hexdigest()
    return "" if found == digest else f"its {algorithm} is {found}; wanted {digest}"


if __name__ == "__main__":
    main()
