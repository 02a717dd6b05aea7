"""What every layer is built of: tiles, matrix products, ordered sums, the mask, the table."""

from .tuning import GROUP_KERNELS, KERNELS, STRATEGIES, Config, Shape, candidates, lookup, strategy

__all__ = [
    "GROUP_KERNELS",
    "KERNELS",
    "STRATEGIES",
    "Config",
    "Shape",
    "candidates",
    "lookup",
    "strategy",
]
