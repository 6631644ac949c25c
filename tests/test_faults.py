"""Faults that no reranker may suffer from: damaged files, a full disk, a kill, Ctrl-C, forks.

The tests of each reranker cover memory that runs out. contract.py covers threads, copies, pickles and NaN.
"""

import ast
import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from contract import assert_same_scores
from test_imports import MAP, source


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def header_of(file):
    """Return the number of bytes before the weights in a safetensors file."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def with_flipped_bit(file, at, bit):
    damaged = bytearray(file.read_bytes())
    damaged[at] ^= 1 << bit
    file.write_bytes(damaged)


@pytest.fixture
def copied(small, tmp_path):
    """The folder of a copy of the checkpoint, and a function that makes a reranker with it."""
    model = Path(small().model)
    folder = shutil.copytree(model.parent, tmp_path / "copy") / model.name  # PE-Rank's encoder is beside it
    return folder, lambda: small(model=str(folder))


def test_a_flipped_bit_in_the_header_of_the_weights_is_named_or_changes_nothing(copied, frame):
    folder, make = copied
    file, drawn = folder / "model.safetensors", random.Random(0)
    whole, weights, named = file.read_bytes(), safetensors.torch.load_file(file), 0
    for at in [*range(8), *drawn.sample(range(8, header_of(file)), 30)]:
        with_flipped_bit(file, at, drawn.randrange(8))
        try:
            make()(frame)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error)
            named += 1
        else:
            read = safetensors.torch.load_file(file)
            assert read.keys() == weights.keys()
            assert all(torch.equal(read[name], weights[name]) for name in weights)
        file.write_bytes(whole)
    assert named > 20


READ = {  # the files that each reranker reads, relative to the folder of its checkpoint
    "CrossEncoder": ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"],
    "LiT5Distill": ["config.json", "model.safetensors", "spiece.model"],
    "LiT5Score": ["config.json", "model.safetensors", "spiece.model"],
    "PERank": [
        *("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"),
        *("../encoder/config.json", "../encoder/vocab.txt"),
    ],
}


@pytest.mark.parametrize("share", [0, 0.1, 0.5])
def test_a_file_cut_short_is_named(copied, frame, share):
    folder, make = copied
    for name in READ[type(make()).__name__]:
        file = folder / name
        whole = file.read_bytes()
        if name.endswith("vocab.txt") and share:
            continue  # a shorter text file is a valid vocabulary
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=re.escape(file.name)) as raised:
            make()(frame)
        assert str(file.parent.resolve()) in str(raised.value)
        file.write_bytes(whole)
    make()(frame)


def test_a_flipped_bit_in_a_weight_is_not_noticed(copied):
    folder, make = copied
    file = folder / "model.safetensors"
    with_flipped_bit(file, header_of(file) + 1_000, 3)
    make().load()


@contextlib.contextmanager
def disk_of(n):
    """Return a context manager in which no file may grow beyond n bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("space", [100, 5_000, 100_000])
def test_a_full_disk_while_saving_leaves_the_old_checkpoint(small, frame, tmp_path, space):
    reranker = small()
    expected = reranker(frame)
    reranker.save(tmp_path)
    before = contents(tmp_path)
    with disk_of(space), pytest.raises(OSError, match=f"{tmp_path} could not be saved and is as it was before"):
        reranker.save(tmp_path)
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".saving-*"))
    assert_same_scores(small(model=str(tmp_path))(frame), expected)


def in_a_fork(function):
    """Run a function in a forked process. Returns its exit code: negative for a signal, None if it does not end."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(15)
    code = process.exitcode
    process.kill()
    return code


def test_a_process_killed_while_saving_leaves_the_old_checkpoint(small, frame, tmp_path):
    reranker = small()
    expected = reranker(frame)
    reranker.save(tmp_path)
    before = contents(tmp_path)

    def killed():
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills the process in the middle of a write
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        reranker.save(tmp_path)

    assert in_a_fork(killed) == -signal.SIGXFSZ
    assert contents(tmp_path) == before
    assert list(tmp_path.glob(".saving-*"))
    assert_same_scores(small(model=str(tmp_path))(frame), expected)
    reranker.save(tmp_path)


@pytest.mark.parametrize("at", [0, 3, 30])
def test_ctrl_c_in_the_middle_of_a_call_leaves_the_object_usable(small, frame, at):
    reranker, modules = small(), []
    expected = reranker(frame)

    def interrupt(module, inputs):
        modules.append(module)
        if len(modules) == at + 1:
            signal.raise_signal(signal.SIGINT)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            reranker(frame)
    finally:
        hook.remove()
    assert len(modules) == at + 1
    assert_same_scores(reranker(frame), expected)


def test_ctrl_c_while_weights_load_leaves_the_object_usable(copied, small, frame, monkeypatch):
    reranker, load = copied[1](), safetensors.torch.load_file
    monkeypatch.setattr(safetensors.torch, "load_file", lambda file: signal.raise_signal(signal.SIGINT) or load(file))
    with pytest.raises(KeyboardInterrupt):
        reranker(frame)
    monkeypatch.undo()
    assert_same_scores(reranker(frame), small()(frame))


def test_a_process_forked_after_use_scores_alike(small, frame):
    reranker, threads = small(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = reranker(frame)

        def forked():
            assert_same_scores(reranker(frame), expected)
            os._exit(7)

        assert in_a_fork(forked) == 7
    finally:
        torch.set_num_threads(threads)


def test_a_process_forked_while_another_thread_reads_a_checkpoint_reads_its_own(small):
    """In the child, nobody releases the lock that a thread of the parent holds. Waiting for it would never end."""
    reranker, held, done = small(), threading.Event(), threading.Event()
    reranker.load()

    def reading():
        held.set()
        done.wait()

    thread = threading.Thread(target=reranker.once, args=(reading,))
    thread.start()
    held.wait()
    try:
        assert in_a_fork(reranker.load) == 0
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("used", [False, True])
def test_weights_overwritten_in_place_change_no_loaded_reranker(copied, small, frame, used):
    folder, make = copied
    expected, reranker, file = small()(frame), make(), folder / "model.safetensors"
    reranker(frame) if used else reranker.load()
    start = header_of(file)
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write(bytes(file.stat().st_size - start))
    assert_same_scores(reranker(frame), expected)
    os.truncate(file, start)  # if the file were memory-mapped, this would end the process
    assert_same_scores(reranker(frame), expected)


def configs(folder):
    """Return the config.json of a checkpoint, and the config.json of the encoder beside it."""
    return [file for file in (folder / "config.json", folder.parent / "encoder" / "config.json") if file.exists()]


HUGE = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_decoder_layers"), 10**6),
    **dict.fromkeys(("hidden_size", "d_model", "intermediate_size", "d_ff", "embedding_size"), 12 * 10**6),
    "vocab_size": 10**12,
}


@pytest.mark.parametrize("field", HUGE)
def test_a_config_of_more_than_its_weights_is_refused_at_once_and_in_words(copied, frame, field):
    folder, make = copied
    for file in configs(folder):
        whole = file.read_text()
        if field not in json.loads(whole):
            continue
        file.write_text(json.dumps(json.loads(whole) | {field: HUGE[field]}))
        with pytest.raises(ValueError, match=r"does not hold the weights|cannot be loaded|from different checkpoints"):
            make()(frame)
        file.write_text(whole)
    make()(frame)


def test_a_config_chooses_no_kernels_no_packing_and_no_outputs(copied, small, frame):
    folder, make = copied
    hostile = {
        **dict.fromkeys(("_attn_implementation", "attn_implementation", "experts_implementation"), "evil/kernel"),
        "quantization_config": {"quant_method": "gptq", "bits": 4},
        **{"return_dict": False, "output_attentions": True, "output_hidden_states": True, "torchscript": True},
    }
    for file in configs(folder):
        file.write_text(json.dumps(json.loads(file.read_text()) | hostile))
    assert_same_scores(make()(frame), small()(frame))


def test_no_code_of_a_checkpoint_is_run_whatever_standard_input_answers(copied, frame, monkeypatch, tmp_path):
    """By default, transformers asks on standard input whether it may run the code."""
    folder, make = copied
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    autos = {name: "evil.Evil" for name in ("AutoModel", "AutoConfig", "AutoModelForSequenceClassification")}
    hostile = {
        "config.json": {"model_type": "evil", "auto_map": autos, "architectures": ["EvilForSequenceClassification"]},
        "tokenizer_config.json": {
            "tokenizer_class": "EvilTokenizer", "auto_map": autos | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        },
    }  # fmt: skip
    kind = type(make())
    (folder / "tokenizer.json").unlink(missing_ok=True)
    for name, fields in hostile.items():
        whole = (folder / name).read_text() if (folder / name).exists() else "{}"
        (folder / name).write_text(json.dumps(json.loads(whole) | fields))
        for reranker in (make, lambda: kind.from_backbone(str(folder), device="cpu")):
            monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
            with contextlib.suppress(ValueError, FileNotFoundError):
                reranker()(frame)
        (folder / name).write_text(whole)
    assert not (tmp_path / "owned").exists()


def test_no_code_and_no_pickle_of_a_checkpoint_is_run(copied, frame):
    folder, make = copied
    code = f"open({str(folder / 'owned')!r}, 'w')\nclass Evil: pass\n"
    for name in ("evil.py", "modeling_evil.py", "tokenization_evil.py", "__init__.py"):
        (folder / name).write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            fields = (folder / name).read_text().rstrip()[:-1]
            autos = ", ".join(f'"{auto}": "evil.Evil"' for auto in ("AutoModel", "AutoConfig", "AutoModelForCausalLM"))
            (folder / name).write_text(
                f'{fields}, "auto_map": {{{autos}, "AutoTokenizer": ["evil.Evil", "evil.Evil"]}}}}'
            )
    make()(frame)
    assert not (folder / "owned").exists()


@pytest.mark.parametrize("module", MAP)
def test_no_module_trusts_remote_code_or_unpickles(module):
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            name = ast.unparse(node.func)
            loads = name.endswith((".from_pretrained", "AutoModel.from_config"))
            if "trust_remote_code" in given or (loads and ast.unparse(node.args[0]) != "None"):
                assert ast.unparse(given["trust_remote_code"]) == "False"
            assert name not in ("pickle.load", "pickle.loads", "eval", "exec")
            assert name != "torch.load" or given["weights_only"].value is True
