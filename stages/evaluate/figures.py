"""Draw the figures of the report with matplotlib, as SVG elements that inherit colours and font from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from stages.evaluate.curves import Roc
from stages.evaluate.reliability import Reliability
from stages.evaluate.wording import quoted
from stages.files import read_regular

SERIES = 6
"""Number of colours that the page defines, --c1 to --c6; further series repeat them with another dash."""

# Unused colours as placeholders for those of the page, so that one figure works in light mode, dark mode and print.
_INK, _LINE = "#010101", "#020202"
_COLOURS = [f"#0{n}0{n}0{n}" for n in range(3, 3 + SERIES)]
_PAGE = {_INK: "currentColor", _LINE: "var(--line)"} | {
    stand_in: f"var(--c{number})" for number, stand_in in enumerate(_COLOURS, start=1)
}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (6, 1.5, 1.4, 1.5)))

# Any, because only some versions of matplotlib declare types for these keys.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fpt",
    "font.size": 9.5,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.5,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.4,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}


def draw_roc(roc: Roc, auc: Mapping[str, float | None], mean_auc: float | None, limit: int = 8) -> str:
    """Draw ROC curves: with two classes only that of the second, with more than `limit` classes the worst ones."""
    with rc_context(_STYLE):
        figure, axes = _figure(4.6, 4.1)
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.6)
        names = list(roc.classes)
        if roc.single:
            names = names[1:]
        names = sorted(sorted(names, key=lambda name: auc[name] or 0.0)[:limit], key=names.index)
        for number, name in enumerate(names):
            axes.plot(*roc.classes[name], label=_legend(quoted(_short(name)), auc[name]), **_series(number))
        if roc.mean is not None and not roc.single:
            axes.plot(*roc.mean, color=_INK, linewidth=2.4, label=_legend("mean", mean_auc))
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), xlabel="False-positive rate", ylabel="True-positive rate")
        axes.legend(loc="lower right")
        return _svg(figure, "roc")


def draw_reliability(curve: Reliability, ylabel: str = "Accuracy") -> str:
    """Draw accuracy against confidence; the area of a dot grows with the number of rows in its bin."""
    with rc_context(_STYLE):
        figure, axes = _figure(4.6, 4.1)
        axes.plot(
            [0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.6, label="perfect calibration"
        )
        axes.plot(curve.confidence, curve.accuracy, color=_COLOURS[0], label="this model")
        axes.scatter(curve.confidence, curve.accuracy, s=20 + 160 * curve.rows / curve.rows.sum(), color=_COLOURS[0])
        for x, rows in zip(curve.confidence, curve.rows, strict=True):
            axes.annotate(f"{rows}", (x, 0.0), (0, 3), textcoords="offset points", ha="center", fontsize=8)
        axes.set(xlim=(-0.01, 1.03), ylim=(-0.01, 1.04), xlabel="Confidence", ylabel=ylabel)
        axes.legend(loc="upper left")
        return _svg(figure, "reliability")


def draw_curves(curves: Mapping[str, npt.NDArray[np.float64]], best_epoch: int | None, ylabel: str) -> str:
    """Draw values by epoch; `curves` maps a name to (epochs, 2): epoch, counted from 1, and value."""
    with rc_context(_STYLE):
        figure, axes = _figure(4.6, 3.1)
        for number, (name, points) in enumerate(curves.items()):
            marker = "o" if len(points) == 1 else ""
            axes.plot(points[:, 0], points[:, 1], label=name, marker=marker, **_series(number))
        if best_epoch is not None:
            axes.axvline(best_epoch, color=_INK, linewidth=0.8, linestyle=(0, (2, 3)), label="selected epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="Epoch", ylabel=ylabel)
        axes.legend(loc="best")
        return _svg(figure, re.sub(r"\W", "", ylabel))


def draw_memory(
    points: Mapping[str, tuple[float | None, float, float | None]], full_mib: float, name: str, ylabel: str = "Test AUC"
) -> str:
    """Draw a score against the memory of a training step, on a logarithmic scale.

    Args:
        points: Method -> memory in MiB (None: no training step), mean score, standard deviation (None: a single run).
        full_mib: Memory of full fine-tuning, MiB: a vertical line.
        name: Prefix of the ids in the figure.
        ylabel: Name of the score.
    """
    known = [memory for memory, _, _ in points.values() if memory is not None]
    left = min([*known, full_mib]) / 3
    with rc_context(_STYLE):
        figure, axes = _figure(7.2, 4.4)
        axes.axvline(full_mib, color=_INK, linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.6, label="full fine-tuning")
        axes.set_xscale("log")
        axes.set(xlim=(left / 1.5, max([*known, full_mib]) * 3), ylabel=ylabel)
        axes.set_xlabel("Tensor memory of a training step, MiB (hollow: no training step)")
        for number, (memory, mean, deviation) in enumerate(points.values()):
            colour = _COLOURS[number % SERIES]
            style = {"color": colour, "markerfacecolor": "none" if memory is None else colour}
            axes.errorbar(memory or left, mean, yerr=deviation, fmt="o", capsize=2, linewidth=1.0, **style)
        axes.legend(loc="lower right")
        places = [(memory or left, mean) for memory, mean, _ in points.values()]
        offsets = _label_offsets(axes.transData.transform(places) * 72 / figure.dpi, [_short(one) for one in points])
        for number, (method, place, offset) in enumerate(zip(points, places, offsets, strict=True)):
            text = _legend(_short(method), None)
            colour = _COLOURS[number % SERIES]
            axes.annotate(text, place, (5, offset), textcoords="offset points", color=colour, fontsize=8)
        return _svg(figure, name)


def _label_offsets(places: npt.NDArray[np.float64], labels: Sequence[str]) -> list[int]:
    """Return a vertical offset of the label next to each place (n, 2), in points, so that few labels overlap."""
    taken: list[tuple[float, float, float]] = []
    offsets = []
    for (x, y), label in zip(places.tolist(), labels, strict=True):
        width = 4.5 * len(label)
        tries = [3, *(3 + sign * 9 * step for step in range(1, 9) for sign in (-1, 1))]
        free = [
            offset
            for offset in tries
            if all(x + width < left or right < x or abs(y + offset - at) >= 9 for left, right, at in taken)
        ]
        offset = (free or tries)[0]
        taken.append((x, x + width, y + offset))
        offsets.append(offset)
    return offsets


def read_training_curves(folder: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Read the series that DVCLive wrote: name, such as "train/loss" -> (epochs, 2), epoch from 1 and value.

    Lines without numbers are skipped, and so is the file of a metric that was never defined.
    """
    root, curves = folder / "plots" / "metrics", {}
    for path in sorted(root.rglob("*.tsv")):
        points = []
        for line in read_regular(path).decode(errors="replace").splitlines()[1:]:
            try:
                step, value = (float(part) for part in line.split("\t")[-2:])
            except ValueError:
                continue
            if np.isfinite(value):
                points.append((step, value))
        if points:
            curves[path.relative_to(root).with_suffix("").as_posix()] = np.asarray(points, dtype=np.float64)
    return curves


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _series(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % SERIES], "linestyle": _DASHES[number % len(_DASHES)]}


def _short(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _legend(label: str, auc: float | None) -> str:
    # An unescaped dollar sign would start a formula.
    return label.replace("$", r"\$") + ("" if auc is None else f"  {auc:.3f}")


def _svg(figure: Figure, name: str) -> str:
    """Return the figure as an `<svg>` element for a page: without size and font, and with unique ids."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for stand_in, colour in _PAGE.items():
        text = text.replace(stand_in, colour)
    return re.sub(r"\n\s*\n", "\n", text)


def group_curves(curves: Mapping[str, npt.NDArray[np.float64]]) -> Sequence[tuple[str, dict[str, Any]]]:
    """Group training series that share an axis: losses, and scores between 0 and 1."""
    losses = {name: points for name, points in curves.items() if name.endswith("loss")}
    scores = {name: points for name, points in curves.items() if name.endswith(("auc", "accuracy"))}
    return [(title, group) for title, group in (("Loss", losses), ("Validation", scores)) if group]
