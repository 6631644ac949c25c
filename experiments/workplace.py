"""Sets up a notebook: chooses its profile, silences warnings, and avoids the network."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import pyterrier as pt
import transformers


def enter(profile: str, notebook: str, **profiles: Callable[[], dict[str, Any]]) -> tuple[SimpleNamespace, Path]:
    """Set seeds. Returns the parameters of the chosen profile, and the folder `results/PROFILE/NOTEBOOK`, in which the
    notebook keeps its results.

    profile: the name of the chosen profile. profiles: name of a profile -> a function that returns the notebook's
    parameters in this profile. Only the function of the chosen profile is called. If the parameters do not set
    "verbose" to True, progress bars and messages of transformers are switched off. Raises ValueError if no profile has
    this name.
    """
    if profile not in profiles:
        raise ValueError(f"PROFILE={profile!r}; wanted one of {', '.join(map(repr, profiles))}")
    folder = Path("results", profile, notebook)
    folder.mkdir(parents=True, exist_ok=True)
    transformers.set_seed(42)
    warnings.filterwarnings("ignore", message="The inplace keyword", category=DeprecationWarning)  # pyterrier, pandas 3
    warnings.filterwarnings("ignore", "more than half of the passages were truncated")  # the papers truncate, too
    parameters = SimpleNamespace(**{"verbose": False} | profiles[profile]())
    if not parameters.verbose:
        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        pt.documentation._cached_objects_inv = {}  # so that pictures of pipelines fetch no inventory from the web
    return parameters, folder
