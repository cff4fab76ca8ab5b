"""How vLLM splits layers if it is not told."""

import pytest

from serve_app.planning.pipeline.stage import even_split


@pytest.mark.parametrize(
    ("layers", "stages", "split"),
    [
        (28, 2, (14, 14)), (28, 3, (9, 10, 9)), (29, 3, (10, 10, 9)), (5, 4, (1, 1, 2, 1)), (2, 3, (1, 1, 0)),
        (80, 8, (10,) * 8), (7, 1, (7,)),
    ],
)  # fmt: skip
def test_the_rest_goes_to_the_stages_before_the_last(layers: int, stages: int, split: tuple[int, ...]) -> None:
    """The last stage has the head. `test_vllm_stages.py` compares this with vLLM's own function."""
    assert even_split(layers, stages) == split
