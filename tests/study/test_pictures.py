"""Figures: labels at the ends of lines that do not overlap, norms of captured values, attention maps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from jaxllm.config import LlamaConfig, T5Config
from jaxllm.config.model import ModelConfig
from jaxllm.models import build, init_params
from jaxllm.study import capture
from jaxllm.study.pictures import COLOURS, Line, attention_maps, line_figure, norms

SIZES: dict[str, Any] = {"vocab_size": 32, "d_model": 8, "d_ff": 12, "num_layers": 3, "num_heads": 2}


def labels_of(figure: Figure) -> list[Annotation]:
    return [text for text in figure.axes[0].texts if isinstance(text, Annotation)]


def check_labels(figure: Figure) -> None:
    """Draws it: all labels are inside the figure, to the right of the axes, and none covers another."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [Text.get_window_extent(text, canvas.get_renderer()) for text in labels_of(figure)]  # without the leaders
    right, whole = figure.axes[0].get_window_extent().x1, figure.bbox
    assert all(right <= box.x0 < box.x1 <= whole.x1 and 0 <= box.y0 < box.y1 <= whole.y1 for box in texts)
    assert not [pair for pair in itertools.combinations(texts, 2) if pair[0].overlaps(pair[1])]


def line(label: str, y: Sequence[float], colour: str = COLOURS[0]) -> Line:
    return label, range(len(y)), y, {"color": colour}


@pytest.mark.parametrize(
    "ends",
    [[1.0], [1.0, 1.0], [1.0, 1.01, 1.02, 1.0, 5.0], [2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.5, 3.0]],
    ids=lambda ends: f"{len(ends)} lines",
)
def test_labels_of_lines_do_not_overlap(ends: list[float]) -> None:
    lines = [line(f"run_{i} $x 1.234", [4.0, end], COLOURS[i % 7]) for i, end in enumerate(ends)]
    figure = line_figure(lines, x="step", y="loss", title="$a_run")
    check_labels(figure)
    assert {text.get_text() for text in labels_of(figure)} == {label for label, *_ in lines}
    heights = [text.xyann[1] for text in sorted(labels_of(figure), key=lambda text: text.xyann[1])]
    assert np.all(np.diff(heights) >= 0.055 - 1e-9)


def test_labels_keep_the_order_of_the_ends_and_stay_at_their_height_where_there_is_room() -> None:
    figure = line_figure([line("high", [0, 9]), line("low", [0, 1]), line("middle", [0, 5])], x="", y="", title="")
    heights = {text.get_text(): text.xyann[1] for text in labels_of(figure)}
    low, high = figure.axes[0].get_ylim()
    for label, end in {"high": 9, "low": 1, "middle": 5}.items():
        assert heights[label] == pytest.approx((end - low) / (high - low))


def test_a_label_is_at_the_last_finite_point_and_an_empty_one_is_absent() -> None:
    lines = [line("stopped", [3.0, 2.0, np.nan, np.nan]), line("", [3.0, 1.0, 1.0, 1.0])]
    figure = line_figure(lines, x="", y="", title="", top=2.5)
    (label,) = labels_of(figure)
    assert (label.get_text(), *label.xy) == ("stopped", 1, 2.0)
    assert figure.axes[0].get_ylim()[1] == 2.5
    check_labels(figure)


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), T5Config(**SIZES, head_dim=4)], ids=lambda c: c.family)
def test_norms_are_means_over_tokens_of_what_was_captured(config: ModelConfig) -> None:
    model = build(config)
    params = init_params(model, jax.random.key(0))
    tokens = jnp.arange(10).reshape(2, 5)
    inputs = (tokens, tokens) if config.encoder_decoder else (tokens,)
    _, seen = capture(lambda p, *ids: model.apply({"params": p}, *ids), "after_mlp", "mlp_output")(params, *inputs)
    figure = norms(seen, title="a model")
    assert len(seen) == (4 if config.encoder_decoder else 2)
    for drawn, value in zip(figure.axes[0].lines, seen.values(), strict=True):
        wanted = [np.mean(np.sqrt(np.sum(np.square(layer), axis=-1))) for layer in np.asarray(value)]
        np.testing.assert_allclose(drawn.get_ydata(), wanted, rtol=1e-5)
    assert [text.get_text() for text in labels_of(figure)] != [] and set(seen) == {
        t.get_text() for t in labels_of(figure)
    }
    assert figure.axes[0].get_yscale() == "log"
    check_labels(figure)


def test_attention_maps_show_every_head_on_one_scale_with_tokens_as_they_are() -> None:
    weights = np.random.default_rng(0).dirichlet(np.ones(3), size=(2, 4, 3))
    figure = attention_maps(weights, queries=["$a", "b_c", "d"], keys=["x", "y", "z"], title="maps")
    *panels, scale = figure.axes
    assert [axes.get_title() for axes in panels[:2]] == ["layer 0, head 0", "layer 0, head 1"] and len(panels) == 8
    for axes, shown in zip(panels, weights.reshape(8, 3, 3), strict=True):
        (image,) = axes.images
        np.testing.assert_array_equal(image.get_array(), shown)
        assert image.get_clim() == (0, weights.max())
    FigureCanvasAgg(figure).draw()
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["$a", "b_c", "d"]
    assert [text.get_text() for text in panels[-1].get_xticklabels()] == ["x", "y", "z"]
    assert "weight" in scale.get_ylabel()


def test_attention_maps_refuse_values_with_the_axis_of_rows() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 1, 4, 3, 3\); take a row"):
        attention_maps(np.ones((2, 1, 4, 3, 3)))
