"""Training, declared in pipelines: FineTune learns from labels, Distil from a teacher."""

from pyterrier_lit.training.data import read_teacher
from pyterrier_lit.training.distil import Distil, FineTune

__all__ = ["Distil", "FineTune", "read_teacher"]
