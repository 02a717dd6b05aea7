"""What a LoRA adapter is: its rank, its scale, and the modules it goes on."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


def lora_scale(rank: int, alpha: float | None = None, use_rslora: bool = False) -> float:
    """Factor on the LoRA branch: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA.

    Args:
        rank: inner dimension R, at least 1.
        alpha: numerator of the scale; ``None`` means a scale of 1.
        use_rslora: divide by the root of the rank.

    Returns:
        The scale, dimensionless.

    Source: LoRA, arXiv 2106.09685, section 4.1; rsLoRA, arXiv 2312.03732, equation 2.
    """
    if alpha is None:
        return 1.0
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def check_rank(rank: Any, argument: str = "rank") -> int:
    """Return ``rank`` if it is an integer of at least 1, else raise naming ``argument``."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{argument} must be an integer, got {rank!r}; common values are 8 and 16")
    if not 1 <= rank < 2**31:
        wanted = "at least 1" if rank < 1 else "below 2³¹"
        raise ValueError(
            f"{argument} must be {wanted}, got {reprlib.repr(rank)}; common values are 8 and 16"
        )
    return rank


def check_alpha(alpha: Any, argument: str = "alpha") -> float | None:
    """Return ``alpha`` as a float or None, else raise naming ``argument``."""
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"{argument} must be a number or None, got {alpha!r}; None means scale 1")
    try:
        number = float(alpha)
    except OverflowError:  # of a whole number that no float is near
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(
            f"{argument} must be finite, got {reprlib.repr(alpha)}; a common value is 2 * rank"
        )
    return number


def check_dropout(dropout: Any, argument: str = "dropout") -> float:
    """Return ``dropout`` as a float in [0, 1), else raise naming ``argument``."""
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"{argument} must be a number in [0, 1), got {dropout!r}; 0 turns it off")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(
            f"{argument} must be in [0, 1), got {reprlib.repr(dropout)}; common values: 0, 0.05, "
            "0.1"
        )
    return float(dropout)


@dataclass(frozen=True)
class LayerConfig:
    """One layer's share of an adapter: everything but the two matrices.

    Attributes are those of `LoRAConfig`; they are checked on construction.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False

    def __post_init__(self) -> None:
        check_rank(self.rank)
        object.__setattr__(self, "alpha", check_alpha(self.alpha))
        object.__setattr__(self, "dropout", check_dropout(self.dropout))
        if not isinstance(self.use_rslora, bool):
            raise TypeError(f"use_rslora must be True or False, got {self.use_rslora!r}")

    @property
    def scale(self) -> float:
        """`lora_scale` of this layer."""
        return lora_scale(self.rank, self.alpha, self.use_rslora)


BIASES = ("none", "lora_only", "all")


@dataclass(frozen=True)
class LoRAConfig:
    """Which modules get LoRA, and of what rank and scale.

    Args:
        rank: inner dimension R of every factor pair, at least 1.
        alpha: numerator of the scale, see `lora_scale`; ``None`` means scale 1.
        dropout: probability in [0, 1) with which the LoRA branch drops elements of its input.
        target_modules: ``None`` for every square linear (``in_features == out_features``); a list
            of whole module names or dotted suffixes; a string is one regular expression matched
            against the whole name, or ``"all-linear"`` for every linear but the head.
        exclude_modules: names, suffixes or one regular expression to leave out, same rules.
        rank_pattern: rank of the modules whose name ends in a key (a regular expression matched
            from a dot or the beginning to the end of the name; the first that matches wins).
        alpha_pattern: alpha, likewise.
        use_rslora: divide alpha by the root of the rank instead of the rank.
        modules_to_save: names or dotted suffixes of modules that are trained and saved whole, in
            their own dtype: a head, embeddings, norms. Linears in them get no LoRA. The head of a
            transformers model for classification or question answering, which a base checkpoint
            does not hold, is added by itself; an empty list leaves it as it is. A vocabulary is
            resized before: resizing puts another head in the place of the trained one.
        bias: which biases are trained and saved whole: ``"none"``, ``"lora_only"`` for those of the
            adapted linears, or ``"all"`` of the model's.
        trainable_token_indices: tokens whose rows of the input embeddings are trained (in float32
            or wider), and of a head tied to it; or ``{"embed_tokens": [1, 2]}`` for others.
        target_parameters: names or dotted suffixes of parameters that hold the weights of all
            experts of a layer, as transformers 5 keeps them: ``["gate_up_proj", "down_proj"]``.
            Without ``target_modules`` these alone are adapted.

    Raises:
        TypeError, ValueError: an argument is of another kind or outside its range.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    modules_to_save: Sequence[str] | None = None
    bias: str = "none"
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    target_parameters: Sequence[str] | None = None

    def __post_init__(self) -> None:
        LayerConfig(self.rank, self.alpha, self.dropout, self.use_rslora)
        if isinstance(self.target_parameters, str):
            raise TypeError(
                "target_parameters must be None or a list of parameter names, got "
                f"{self.target_parameters!r}; put it into a list"
            )
        parameters = _names(self.target_parameters, "target_parameters") or None
        object.__setattr__(self, "target_parameters", parameters)
        if isinstance(self.modules_to_save, str):
            raise TypeError(
                "modules_to_save must be None or a list of module names, got "
                f"{self.modules_to_save!r}; put it into a list"
            )
        saved = _names(self.modules_to_save, "modules_to_save")
        object.__setattr__(self, "modules_to_save", saved)
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}, got {self.bias!r}")
        tokens = _indices(self.trainable_token_indices)
        object.__setattr__(self, "trainable_token_indices", tokens)
        if parameters and not self.target_modules:  # PEFT writes [] for no modules
            object.__setattr__(self, "target_modules", None)
        for argument in ("target_modules", "exclude_modules"):
            object.__setattr__(self, argument, _names(getattr(self, argument), argument))
        for argument, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
            pattern = getattr(self, argument)
            pattern = {} if pattern is None else pattern
            if not isinstance(pattern, Mapping):
                raise TypeError(
                    f"{argument} must map module names to numbers, got {type(pattern).__name__}"
                )
            for key, value in pattern.items():
                _compiled(key, argument, _ENDING)
                check(value, f"{argument}[{key!r}]")
            object.__setattr__(self, argument, dict(pattern))

    def layer(self, name: str) -> LayerConfig:
        """The rank and scale of the module called ``name``, patterns applied."""
        return LayerConfig(
            rank=_first_match(self.rank_pattern, name, self.rank),
            alpha=_first_match(self.alpha_pattern, name, self.alpha),
            dropout=self.dropout,
            use_rslora=self.use_rslora,
        )


# How a key of rank_pattern or alpha_pattern is matched.
_ENDING = r"(.*\.)?({})$"


def ends_in(key: str, name: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern matches the module called ``name``."""
    return re.match(_ENDING.format(key), name) is not None


def _first_match(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if ends_in(key, name)), default)


def _compiled(expression: Any, argument: str, around: str = "{}") -> re.Pattern[str]:
    try:
        return re.compile(around.format(expression))
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{argument} holds {expression!r}, which is not a regular expression: {error}"
        ) from None


def _names(value: Any, argument: str) -> tuple[str, ...] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        _compiled(value, argument)
        return value
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(
        isinstance(name, str) and name for name in value
    ):
        raise TypeError(
            f"{argument} must be None, a string, or a list of module names, got {value!r}"
        )
    if not value and argument == "target_modules":
        raise ValueError(f"{argument} is empty; name at least one module, or pass None")
    return tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)


def _indices(value: Any) -> list[int] | dict[str, list[int]] | None:
    if value is None:
        return None
    rows = value if isinstance(value, Mapping) else {"": value}
    for name, indices in rows.items():
        whole = not isinstance(indices, (str, bytes)) and isinstance(indices, Sequence)
        if not whole or not indices or not all(type(i) is int and i >= 0 for i in indices):
            raise ValueError(
                "trainable_token_indices must be a list of token numbers, or map names of "
                f"embeddings to such lists, got {indices!r}{f' for {name!r}' if name else ''}"
            )
        if len(set(indices)) < len(indices):
            raise ValueError(f"trainable_token_indices names a token twice: {indices!r}")
    if isinstance(value, Mapping):
        return {str(name): list(indices) for name, indices in value.items()}
    return list(value)
