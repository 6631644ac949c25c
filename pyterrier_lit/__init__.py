__version__ = "0.1.0"

from pyterrier_lit.cross_encoder import CrossEncoder

__all__ = ["CrossEncoder"]
