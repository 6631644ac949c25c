"""Lists and downloads the data that the notebooks use, and that licences or size keep out of the repository.

python experiments/fetch.py                      lists the data with its notebooks and sizes; fetches nothing
python experiments/fetch.py trec_dl beir         fetches all data that these notebooks use
python experiments/fetch.py runs/dl22.qrels.txt  fetches the data of this name

The data goes to experiments/data. Each row of public.csv has the name of some data, and says where they are downloaded
from: a URL, a record of Zenodo (all its files), the Hugging Face hub, or TIRA (the first stage's runs for the tasks of
TIREx). An interrupted download resumes. A file whose checksum is known is kept only if its content has this checksum.
Archives are not unpacked. Unpack them yourself, and put the runs in them into data/runs under the names that
public_runs.py reads.
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
    """A file to download. size: in bytes; 0 if unknown. checksum: "ALGORITHM:DIGEST"; empty if unknown."""

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
    states = ["here" if (data / name).exists() else "missing" for name in sources["name"]]
    sizes = [f"{int(size) / 2**20:.1f} MB" if size else "known when fetched" for size in sources["bytes"]]
    return pd.DataFrame({"name": sources["name"], "state": states, "notebooks": sources["notebooks"], "size": sizes})


def file(source: tuple, path: Path) -> None:
    download(File(path, source.where, int(source.bytes or 0), source.checksum))


def zenodo(source: tuple, folder: Path) -> None:
    """Fetch all files of a record of Zenodo. The record gives the sizes and checksums of the files."""
    record = requests.get(source.where, timeout=60)
    record.raise_for_status()
    for entry in record.json()["files"]:
        download(File(folder / entry["key"], entry["links"]["self"], entry["size"], entry["checksum"]))


def hub(source: tuple, folder: Path) -> None:
    """Fetch a data set from the hub. The hub's client resumes interrupted downloads and verifies the files."""
    files = HfApi().dataset_info(source.where, files_metadata=True).siblings
    print(f"{len(files)} files, {sum(entry.size or 0 for entry in files) / 2**20:.1f} MB")
    snapshot_download(source.where, repo_type="dataset", local_dir=folder)


def tirex(source: tuple, folder: Path) -> None:
    """Fetch the first stage of TIREx's tasks with TIRA's client. The run of the task antique/test, for example, is
    written to antique-test.txt. Runs that are already on this machine are not fetched again."""
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
    """Fetch a file, or the rest of a file whose download was interrupted. If the size or the checksum of the file is
    wrong, the file is deleted and ValueError is raised. ValueError is also raised if the server sends a web page."""
    if wanted.path.exists():
        return
    part = wanted.path.with_name(f"{wanted.path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    if not wanted.size or have < wanted.size:
        with open(part, "ab") as out:
            for chunk in received(wanted, have):
                if chunk is None:  # the server sends the whole file
                    out.truncate(0)
                else:
                    out.write(chunk)
    if said := wrong(part, wanted):
        part.unlink()
        raise ValueError(f"{wanted.url}: {said}; nothing was kept. Try again, or see whether public.csv is out of date")
    part.replace(wanted.path)


def received(wanted: File, have: int) -> Iterator[bytes | None]:
    """Yield the bytes of a file after its first `have` bytes. If the server sends the whole file instead, the first
    item is None."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    address = quote(wanted.url, safe=":/?&=%")
    with requests.get(address, headers=headers, stream=True, timeout=60) as response:
        if have and response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # the file is already complete
        response.raise_for_status()
        if response.headers.get("Content-Type", "").startswith("text/html"):  # a page for login or confirmation
            raise ValueError(
                f"{wanted.url} is a web page and no file; open it in a browser, and save the file as {wanted.path}"
            )
        if have and response.status_code != requests.codes.partial_content:
            yield None
            have = 0
        with tqdm(total=wanted.size or None, initial=have, unit="B", unit_scale=True, desc=wanted.path.name) as bar:
            for chunk in response.iter_content(2**16):
                yield chunk
                bar.update(len(chunk))


def wrong(path: Path, wanted: File) -> str:
    """What is wrong with a downloaded file; an empty string if nothing is."""
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
