"""Evidence: estimates of log p(x) per datum, by every method, and what tells whether to believe them."""

from .comparison import Comparison, compare
from .curve import Curve, curve_of
from .draws import Draws
from .kinds import RUNGS
from .psis import pareto_khat, pareto_smooth, tail_size
from .results import Evidence
from .streaming import curve_sizes

__all__ = [
    "RUNGS",
    "Comparison",
    "Curve",
    "Draws",
    "Evidence",
    "compare",
    "curve_of",
    "curve_sizes",
    "pareto_khat",
    "pareto_smooth",
    "tail_size",
]
