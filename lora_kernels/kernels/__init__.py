"""What every layer is built of: tiles, matrix products, ordered sums, the mask, the table."""

from .activations import GATE_KERNELS
from .tuning import GROUP_KERNELS, KERNELS, STRATEGIES, Config, Shape, candidates, lookup, strategy

__all__ = [
    "GATE_KERNELS",
    "GROUP_KERNELS",
    "KERNELS",
    "STRATEGIES",
    "Config",
    "Shape",
    "candidates",
    "lookup",
    "strategy",
]
