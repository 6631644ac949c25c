__version__ = "0.1.0"

from pyterrier_lit.cross_encoder import CrossEncoder
from pyterrier_lit.lit5_distill import LiT5Distill
from pyterrier_lit.lit5_score import LiT5Score
from pyterrier_lit.pe_rank import PERank

__all__ = ["CrossEncoder", "LiT5Distill", "LiT5Score", "PERank"]
