"""Matplotlib figures of captured and recorded values. A notebook that imported matplotlib.pyplot shows them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
Line = tuple[str, Any, Any, dict[str, Any]]  # label, x, y, matplotlib's properties


def line_figure(lines: Sequence[Line], *, x: str, y: str, title: str, log: bool = False, top: Any = None) -> Any:
    """A figure of lines; labels that are not empty stand at the last finite points and do not overlap."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.set_title(title, loc="left", fontsize="medium", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if log:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    for _, xs, ys, look in lines:
        axes.plot(xs, ys, **look)
    axes.set_ylim(top=top)  # fixes the limits, by which labels are placed
    named = [(*line, np.flatnonzero(np.isfinite(line[2]))[-1]) for line in lines if line[0]]
    ends = [(xs[last], ys[last]) for _, xs, ys, _, last in named]
    heights = axes.transAxes.inverted().transform(axes.transData.transform(ends))[:, 1]
    order = np.argsort(heights, kind="stable")
    # Moved as little as possible to be 0.055 apart: isotonic regression by its min-max formula.
    n, free = range(len(ends)), heights[order] - 0.055 * np.arange(len(ends))
    for i, k in enumerate(order):
        height = max(min(free[a : b + 1].mean() for b in n[i:]) for a in n[: i + 1]) + 0.055 * i
        leader = {"arrowstyle": "-", "alpha": 0.3, "shrinkA": 0, "color": named[k][3]["color"]}
        text = axes.annotate(named[k][0], ends[k], (1.02, height), textcoords="axes fraction", arrowprops=leader)
        text.set(color=leader["color"], va="center", fontsize="small", parse_math=False)
    return figure


def norms(seen: Mapping[str, Any], *, title: str = "") -> Any:
    """A figure of the norms of captured values [L, ..., D] over layers, means over tokens, on a log scale."""
    sizes = {path: np.linalg.norm(np.asarray(value, np.float32), axis=-1) for path, value in seen.items()}
    means = {path: size.reshape(len(size), -1).mean(axis=1) for path, size in sizes.items()}
    looks = [{"color": colour, "marker": "o"} for colour in np.resize(COLOURS, len(means))]
    lines = [(path, range(len(y)), y, look) for (path, y), look in zip(means.items(), looks, strict=True)]
    figure = line_figure(lines, x="layer", y="norm, mean over tokens", title=title, log=True)
    figure.axes[0].xaxis.get_major_locator().set_params(integer=True)
    return figure


def attention_maps(weights: Any, *, queries: Sequence[str] = (), keys: Sequence[str] = (), title: str = "") -> Any:
    """A figure of attention weights [L, N, T, S]: a map for each layer and head, queries down and keys across."""
    from matplotlib.figure import Figure

    if np.ndim(weights) != 4:
        raise ValueError(f"weights must be [L, N, T, S], got {np.shape(weights)}; take a row of [L, B, N, T, S]")
    layers, heads = np.shape(weights)[:2]
    height, width = (max(1.3, 0.2 * len(tokens)) for tokens in (queries, keys))
    figure = Figure(figsize=(width * heads + 1.6, height * layers + 1.2), layout="constrained")
    grid = figure.subplots(layers, heads, sharex=True, sharey=True, squeeze=False)
    for (layer, head), axes in np.ndenumerate(grid):
        image = axes.imshow(weights[layer, head], cmap="Blues", vmin=0, vmax=np.max(weights))
        axes.set_title(f"layer {layer}, head {head}" if grid.size > 1 else "", fontsize="small")
        axes.set_yticks(range(len(queries)), queries, fontsize="small", parse_math=False)
        axes.set_xticks(range(len(keys)), keys, fontsize="small", parse_math=False, rotation=90)
    figure.suptitle(title)
    figure.colorbar(image, ax=grid, label="attention weight")
    return figure
