"""What every layer is built of: tiles, matrix products, ordered sums, the mask, the table."""

from .tuning import KERNELS, STRATEGIES, Config, Shape, candidates, lookup, strategy

__all__ = [
    "KERNELS",
    "STRATEGIES",
    "Config",
    "Shape",
    "candidates",
    "lookup",
    "strategy",
]
