"""The JSON files that sentence-transformers adds to a cross-encoder. This module does not deal with networks."""

import dataclasses
import json
from typing import Any

from pyterrier_lit.models.checkpoints import Folder
from pyterrier_lit.models.errors import damaged

MODULES, SETTINGS, READING = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
# KNOWN lists the supported settings in sentence_bert_config.json. TEXT_KNOWN lists those in processing_kwargs["text"],
# an object in the same file
KNOWN = ("max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name", "unpad_inputs")
PROCESSING, TEXT_KNOWN = "processing_kwargs", ("max_length", "truncation", "padding")


@dataclasses.dataclass(frozen=True)
class SentenceFiles:
    """The settings in the JSON files that sentence-transformers adds to a cross-encoder.

    Args:
        prompt: a text that is put before each query.
        max_length: the maximum input length in tokens. None means that these files set no maximum.
        lower_case: whether texts are lower-cased.
        chat: False if sentence-transformers ignores the tokenizer's chat template because of these files. If True,
            sentence-transformers builds its inputs with a chat template that has placeholders for a query and a
            document.
        files: the files themselves, as name -> content.
    """

    prompt: str = ""
    max_length: int | None = None
    lower_case: bool = False
    chat: bool = True
    files: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_sentence_files(folder: Folder) -> SentenceFiles:
    """Read the settings of sentence-transformers in a folder. If modules.json is missing, or if
    config_sentence_transformers.json does not say that the model is a cross-encoder, return `SentenceFiles()`.

    Raises ValueError if a setting is not supported. The message names the setting and its file.
    """
    files = {name: _read(folder, name) for name in (MODULES, SETTINGS, READING) if (folder.path / name).exists()}
    settings, reading = files.get(SETTINGS, {}), files.get(READING, {})
    if MODULES not in files or settings.get("model_type") != "CrossEncoder":
        return SentenceFiles()
    _check_modules(folder, files[MODULES])
    processing = dict(reading.get(PROCESSING) or {})
    texts = processing.pop("text", {})
    others = [name for name, value in reading.items() if name not in (*KNOWN, PROCESSING) and value]
    others += [f"{PROCESSING}: {name}" for name in [*processing, *(set(texts) - set(TEXT_KNOWN))]]
    others += ["modality_config: message (a chat template)"] * ("message" in (reading.get("modality_config") or {}))
    if others:
        raise ValueError(
            f"{folder.path / READING} sets {', '.join(others)}, which CrossEncoder does not know; wanted settings among"
            f" {', '.join(KNOWN)}"
        )
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts") or {}
    if name is not None and name not in prompts:
        raise ValueError(f"{folder.path / SETTINGS}: default_prompt_name={name!r} is not among {', '.join(prompts)}")
    prompt = (prompts[name] or "") if name is not None else ""
    longest = texts.get("max_length") or reading.get("max_seq_length")
    chat = not reading.get("modality_config")  # a modality_config without "message" has no chat template
    return SentenceFiles(prompt, longest, bool(reading.get("do_lower_case")), chat, files)


def _check_modules(folder: Folder, modules: Any) -> None:
    listed = [f"{module['path'] or 'its root'} ({str(module['type']).split('.')[-1]})" for module in modules]
    if len(modules) != 1 or modules[0]["path"]:
        raise ValueError(
            f"{folder.path / MODULES} puts the cross-encoder of sentence-transformers together from modules:"
            f" {', '.join(listed)}. Such a head is not read; wanted a sequence classifier as the one module"
        )


def _read(folder: Folder, name: str) -> Any:
    try:
        return json.loads((folder.path / name).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise damaged(folder.path / name, error) from error
