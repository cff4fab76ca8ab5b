"""A draft model lies where the plan has it."""

from dataclasses import replace

import pytest
import torch

from serve_app.engines.pt.load import draft
from serve_app.planning.plan import ModelPlan
from tests.engines.pt.core.test_model_runner import loaded
from tests.engines.pt.tiny_models import tiny_model
from tests.planning.test_draft import drafting, one


@pytest.mark.parametrize(("limits", "index"), [({0: "6GB", 1: "15GB"}, 0), ({0: "2.2GB", 1: "20GB"}, 1)])
def test_it_lies_on_the_card_of_the_plan(limits: dict[int, str], index: int) -> None:
    """Which need not be the first one, nor that of the embedding."""
    asked = drafting({"num_hidden_layers": 48}, max_memory=limits, max_model_len=1024, max_num_seqs=4)
    planned = one(asked, "24GiB,24GiB")
    target = replace(loaded(tiny_model("llama")), input_device=torch.device("cuda", 0))
    assert draft._device(target, planned) == index


def test_without_a_plan_it_lies_with_the_embedding() -> None:
    """Also on a card that is not the first."""
    target = replace(loaded(tiny_model("llama")), input_device=torch.device("cuda", 1))
    planned: ModelPlan | None = None
    assert draft._device(target, planned) == 1
