"""Training inside a pipeline: FineTune learns from labels, Distil learns from a teacher."""

from pyterrier_lit.training.data import read_teacher
from pyterrier_lit.training.distil import Distil, FineTune
from pyterrier_lit.training.stored import StoredRun

__all__ = ["Distil", "FineTune", "StoredRun", "read_teacher"]
