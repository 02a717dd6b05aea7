"""The ordered second stage of split sums, and how loops are split."""

from __future__ import annotations

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from kernel_cases import DEVICES

from lora_kernels.kernels.partials import Partial, chunks, sum_partials


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_job_of_a_launch_is_summed(count, device, poisoned):
    shapes = [(17, 5, 7), (2, 1025), (33, 300)][:count]  # more slabs than are read at a time
    jobs = []
    for index, shape in enumerate(shapes):
        out = torch.empty(shape[1:], device=device, dtype=(torch.float32, torch.float16)[index % 2])
        jobs.append(Partial(torch.randn(shape, device=device), out, 0.5 + index))
    sum_partials(jobs)
    for job in jobs:
        expected = job.partials.double().sum(0) * job.scale
        torch.testing.assert_close(job.out.double(), expected, rtol=1e-3, atol=1e-3)


def test_no_job_is_no_launch():
    sum_partials([])


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 64, 1000])
@pytest.mark.parametrize("tiles", [1, 3, 98, 99, 132, 5000])
def test_chunks_cover_every_step_once(tiles, steps):
    count, each = chunks(tiles, steps, 132)
    assert count >= 1
    covered = [s for c in range(count) for s in range(c * each, min((c + 1) * each, steps))]
    assert covered == list(range(steps))
    if steps:
        assert (count - 1) * each < steps  # no empty chunk, which would write a slab for nothing
    if 4 * tiles >= 3 * 132:
        assert count == 1
    assert count * tiles <= max(tiles, 2 * 132)
