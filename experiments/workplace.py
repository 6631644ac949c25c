"""Sets up a notebook: chooses its profile, silences warnings, and avoids the network. Knows no experiment."""

import os
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import pyterrier as pt
import transformers
from profiles import PROFILES, Profile


def enter(profile: str, notebook: str) -> tuple[Profile, Path]:
    """Set seeds, and return the profile of this name and `results/PROFILE/NOTEBOOK`, the folder for what the notebook
    keeps."""
    if profile not in PROFILES:
        raise ValueError(f"PROFILE={profile!r}; wanted one of {', '.join(map(repr, PROFILES))}")
    folder = Path("results", profile, notebook)
    folder.mkdir(parents=True, exist_ok=True)
    transformers.set_seed(42)
    warnings.filterwarnings("ignore", message="The inplace keyword", category=DeprecationWarning)  # pyterrier, pandas 3
    warnings.filterwarnings("ignore", "more than half of the passages were truncated")  # as in the papers
    chosen = PROFILES[profile]()
    if not chosen.verbose:
        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        pt.documentation._cached_objects_inv = {}  # else schematics fetch an inventory from the web
    return chosen, folder
