"""What previews show: held-out prompts, whole and short, or prompts of one's own."""

from types import SimpleNamespace

import pytest
import torch

from ldm.build import compose, make
from ldm.data.dreambooth import Mixture
from ldm.data.phrases import parse
from ldm.data.shapes import NewShape, Shapes
from ldm.metrics.blobs import describe
from ldm.tools.previews import Samples
from ldm.utils.errors import ConfigError


def show(preview, data, field="caption"):
    """The prompts that are drawn, and their seeds."""
    drawn = []

    def draw(prompts, seeds):
        drawn.extend(zip(prompts, seeds, strict=True))
        return torch.zeros(len(prompts), 3, 8, 8, dtype=torch.uint8)

    objective = SimpleNamespace(conditioner=SimpleNamespace(fields={field} - {None}))
    images, labels = preview(draw, data, objective)
    assert len(images) == len(labels) and [prompt for prompt, _ in drawn] == list(labels)
    assert [seed for _, seed in drawn] == list(range(len(drawn)))
    return list(labels)


@pytest.mark.parametrize("prompts", [["a red circle", "a blue square, small"], "a red circle"])
def test_own_prompts_are_drawn_once_each_in_place_of_held_out_ones(prompts):
    node = compose("train", [])["preview"]
    preview = make({**node, "prompts": prompts}, "preview")
    own = [prompts] if isinstance(prompts, str) else prompts
    for data in (Shapes(captions="open"), NewShape(), None):
        assert show(preview, data) == own
    assert show(preview, None, "label") == own


def test_own_prompts_from_the_command_line():
    node = compose("train", ["preview.prompts=[a red circle,a blue square]"])["preview"]
    assert show(make(node, "preview"), Shapes(captions="open")) == ["a red circle", "a blue square"]


def test_own_prompts_of_a_model_that_reads_none_are_refused():
    with pytest.raises(ConfigError, match="preview.prompts=.*a red circle.*reads neither"):
        show(Samples(prompts=["a red circle"]), Shapes(), None)


def test_open_captions_are_shown_whole_and_short_in_turn():
    prompts = show(Samples(count=15), Shapes(captions="open"))
    said = [sum(value is not None for value in parse(prompt).objects[0][:4]) for prompt in prompts]
    assert len(prompts) == 15 and set(said[::2]) == {4} and set(said[1::2]) == {2, 3}


def test_full_captions_are_shown_whole_and_other_data_as_it_says():
    assert show(Samples(count=6), Shapes()) == Shapes().prompts(6, 0)
    data = Mixture([NewShape()], [None], [1.0])
    assert show(Samples(count=5), data) == data.prompts(5)
    assert show(Samples(count=7), Shapes(), "label") == [*Shapes().class_names, "circle"]
    assert show(Samples(count=2), None, None) == ["", ""]


def test_the_blobs_of_nothing_are_none():
    assert describe(torch.full((1, 3, 32, 32), 240, dtype=torch.uint8)) == [[]]
