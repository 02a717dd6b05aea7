"""Each part of a layer computes that part, and counts what it moves and multiplies."""

from __future__ import annotations

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch

from benchmarks.contenders import SCALE, Unavailable, make_inputs
from benchmarks.pieces import PieceCall, operands, pieces
from benchmarks.shapes import Problem
from lora_kernels.proof import ROUNDING

CPU = torch.device("cpu")
M, K, N, R = 48, 32, 40, 8
PROBLEM = Problem("minimind", M, K, N, R)


def by_name(problem=PROBLEM, capability=(9, 0)):
    return {piece.name: piece for piece in pieces(problem, capability)}


def keep_of(bits, columns):
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((bits[..., None] >> shifts) & 1).flatten(1)[:, :columns].bool()


@pytest.mark.interpreted
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_every_piece_computes_its_part(p):
    t = operands(make_inputs(PROBLEM, CPU), p)
    x, w, a, b, dy, xa, dxa = (
        t[name].double() for name in ("x", "weight", "a", "b", "dy", "xa", "dxa")
    )
    mask = keep_of(t["bits"], K).double() / (1 - p) if p else torch.ones(M, K).double()
    base = {} if not p else {"xa": None, "y and xa by one_kernel": None}
    truths = {
        "y by torch": x @ w.t(),
        "dx by torch": dy @ w,
        "y by hopper": x @ w.t() + SCALE * xa @ b.t(),
        "y by fused": x @ w.t() + SCALE * xa @ b.t(),
        "y by beta1": x @ w.t() + SCALE * xa @ b.t(),
        "y and xa by one_kernel": x @ w.t() + SCALE * (x @ a.t()) @ b.t(),
        "dx by hopper": dy @ w + mask * (SCALE * dxa @ a),
        "dx by fused": dy @ w + mask * (SCALE * dxa @ a),
        "dx by beta1": dy @ w + mask * (SCALE * dxa @ a),
        "xa": x @ a.t(),
        "expand y": SCALE * xa @ b.t(),
        "expand dx": mask * (SCALE * dxa @ a),
        "dxa_db": SCALE * dy @ b,
        "da": dxa.t() @ (mask * x),
    } | base
    found = by_name(PROBLEM._replace(dropout=p))
    assert found.keys() == {n for n in truths if not p or n in with_dropout()}
    for name, piece in found.items():
        made = piece.prepared()(t)
        first = next(iter(made.values())) if isinstance(made, dict) else made
        if truths[name] is None:  # draws its mask from the seed
            assert made["keep"].dtype == torch.uint8 and made["keep"].shape == (M, K // 8)
            continue
        error = (first.double() - truths[name]).abs().max() / truths[name].abs().max()
        assert error <= 4 * ROUNDING[torch.bfloat16], name


def with_dropout():
    """What a mask changes."""
    products = {"y and xa by one_kernel", "dx by hopper", "dx by fused", "dx by beta1"}
    return products | {"xa", "expand dx", "da"}


def test_products_count_the_base_product_and_passes_each_byte_once():
    found = by_name()
    for name in ("y by torch", "dx by hopper", "y by beta1", "y and xa by one_kernel"):
        assert (found[name].flops, found[name].bytes) == (2 * M * K * N, 0)
    assert found["xa"].bytes == 2 * (M * K + M * R) + 4 * R * K and not found["xa"].flops
    assert found["expand y"].bytes == 2 * (M * N + M * R) + 4 * N * R
    assert found["dxa_db"].bytes == 2 * (M * N + 2 * M * R) + 8 * N * R
    masked = by_name(PROBLEM._replace(dropout=0.1))
    assert masked["xa"].bytes == found["xa"].bytes + M * K // 8
    assert masked["da"].bytes == found["da"].bytes + M * K // 8


def test_what_the_table_has_no_row_for_is_refused():
    with pytest.raises(Unavailable, match="no row for hopper on sm_80"):
        by_name(capability=(8, 0))["y by hopper"].prepared()
    assert by_name(capability=(8, 0))["y by fused"].block.startswith("gemm")


def test_buffers_are_taken_in_turn():
    call = PieceCall(lambda t: t["x"], [{"x": 0}, {"x": 1}, {"x": 2}])
    seen = []
    for _ in range(4):
        call.prepare()
        seen.append(call.run())
    assert seen == [1, 2, 0, 1]
