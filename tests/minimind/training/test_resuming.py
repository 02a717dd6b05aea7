"""Resume points whose structure is another: one exception, a short message, nothing begun."""

from __future__ import annotations

import copy

import pytest
import torch

from minimind.training.resuming import refuse_strange

STEP = {
    "step": 3, "total_steps": 9, "epoch": 1, "loss": 2.0, "aux_loss": 0.0, "lr": 1e-3,
    "tokens": 5, "seconds": 0.1,
}  # fmt: skip
STATE = {
    "weights": {"a.weight": torch.ones(2)},
    "trainer": {"step": 3, "total_steps": 9},
    "before": {"heldout_loss": 3.0, "base_heldout_loss": None, "answers": ["x"]},
    "report": {"rows": [{"event": "before"}, {"step": 2, "loss": 3.0}], "pending": [STEP]},
}


def test_a_resume_point_as_it_should_be():
    refuse_strange(copy.deepcopy(STATE))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(weights=[torch.ones(2)]),
        lambda s: s["weights"].update({"a.weight": torch.ones(1).expand(2**40)}),
        lambda s: s["weights"].update({"a.weight": torch.ones(2, device="meta")}),
        lambda s: s["weights"].update({"a.weight": 3}),
        lambda s: s.update(trainer=None),
        lambda s: s["trainer"].update(step=-1),
        lambda s: s["trainer"].update(step=10),
        lambda s: s["trainer"].update(step=True),
        lambda s: s["trainer"].update(total_steps="9"),
        lambda s: s["trainer"].pop("step"),
        lambda s: s["before"].pop("answers"),
        lambda s: s["before"].update(more=1),
        lambda s: s.update(before=7),
        lambda s: s["report"].update(rows=3),
        lambda s: s["report"]["rows"].append({"step": 1, "loss": "x"}),
        lambda s: s["report"]["rows"].append({"step": 1}),
        lambda s: s["report"].update(pending=[{**STEP, "strange": 1}]),
        lambda s: s["report"].update(pending=[{"step": 1}]),
    ],
)
def test_what_could_not_go_on_is_refused(change):
    state = copy.deepcopy(STATE)
    change(state)
    with pytest.raises((ValueError, TypeError, LookupError, AttributeError)):
        refuse_strange(state)
