"""The plots of a report: drawn by matplotlib, put into the page as small inline SVG whose colours and fonts are the page's.

Matplotlib draws with stand-in colours, which `_inline` replaces by CSS variables, so that a plot follows light, dark and print.
Text stays text (it can be selected, searched and read aloud), and every plot carries its numbers in words as alternative text.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from limbeck.report.generator_wording import shown
from limbeck.report.measures import Measure
from limbeck.report.summary import Arm, Curve
from limbeck.report.wording import MINUS, NBSP, milliseconds, number, percent, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.7, 3.0  # inches of 72 units: at 390 CSS pixels a unit is about a pixel
INK, SOFT, RULE, PAPER = "#010101", "#010102", "#010103", "#010104"
COLOURS = 8
VARIABLES = {INK: "currentColor", SOFT: "var(--soft)", RULE: "var(--rule)", PAPER: "var(--paper)"} | {f"#0202{i:02x}": f"var(--s{i})" for i in range(COLOURS)}
MARKERS, LINES = ("s", "o", "D", "^", "v", "P", "X", "*"), ("-", "--", ":", "-.")
MOST_POINTS = 150
MOST_CLASSES = 24
STYLE: dict[Any, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "limbeck",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "legend.frameon": False,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Series:
    """An arm in a plot: what the legend calls it, and which colour, marker and line it has."""

    label: str
    colour: int
    arm: Arm

    @property
    def stroke(self) -> str:
        """The stand-in colour."""
        return f"#0202{self.colour % COLOURS:02x}"

    @property
    def marker(self) -> str:
        """The marker, so that colour is not all that tells series apart."""
        return MARKERS[self.colour % len(MARKERS)]

    @property
    def line(self) -> str:
        """The line: dashed where the colours have run out."""
        return LINES[self.colour // COLOURS % len(LINES)]


@dataclass(frozen=True)
class Plot:
    """A plot on the page: its heading, its picture, what it shows in words, and a remark for the reader."""

    title: str
    svg: Markup
    alt: str
    caption: str = ""


def series_of(arms: Sequence[Arm]) -> list[Series]:
    """The arms of one run: teacher, student alone and student distilled have the first three colours."""
    fixed = {"teacher": 0, "alone": 1, "distilled": 2}
    taken: set[int] = set()
    found = []
    for arm in arms:
        wanted = fixed.get(arm.role)
        colour = wanted if wanted is not None and wanted not in taken else next(i for i in range(3, 3 + len(arms) + 1) if i not in taken)
        taken.add(colour)
        found.append(Series(arm.label, colour, arm))
    return found


def curves(series: Sequence[Series]) -> list[Plot]:
    """One plot a player and metric: value by step; the mean over seeds bold, where their steps agree, the seeds thin."""
    kinds = list(dict.fromkeys((c.player, c.metric) for s in series for o in s.arm.outcomes for c in o.curves))
    return [_curve_plot(series, player, metric, f"curve{i}") for i, (player, metric) in enumerate(kinds)]


def _curve_plot(series: Sequence[Series], player: str, metric: str, name: str) -> Plot:
    from matplotlib.ticker import FuncFormatter

    title = f"{player}: {metric}"
    ends, lows, highs = [], [], []
    with _drawing() as figure:
        axes = figure.subplots()
        for s in series:
            found = [_thinned(c) for o in s.arm.outcomes for c in o.curves if (c.player, c.metric) == (player, metric)]
            if not found:
                continue
            mean = _mean_curve(found)
            for steps, values in found if mean is None or len(found) > 1 else []:
                axes.plot(steps, values, color=s.stroke, linestyle=s.line, linewidth=0.7 if mean else 1.2, alpha=0.45 if mean else 0.8)
            steps, values = mean or found[0]
            if mean is not None:
                axes.plot(steps, values, color=s.stroke, linestyle=s.line, linewidth=1.8)
            axes.plot([], [], color=s.stroke, linestyle=s.line, linewidth=1.8, label=s.label)
            finite = [v for _, vs in found for v in vs if math.isfinite(v)]
            lows.append(min(finite, default=math.nan))
            highs.append(max(finite, default=math.nan))
            known = [v for v in values if math.isfinite(v)]
            ends.append(f"{s.label} from {number(known[0])} to {number(known[-1])}" if known else f"{s.label} without a finite value")
        if lows and 0 < min(lows) < max(highs) / 50:
            _logarithmic(axes, "y")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        axes.set_xlabel("step")
        axes.margins(x=0.02)
        _legend(figure, axes)
        alt = f"Learning curves of {metric} of the player {player}: " + "; ".join(ends) + "."
        return Plot(title, _inline(figure, name, alt), alt)


def _thinned(curve: Curve) -> tuple[list[float], list[float]]:
    """Steps and values as means of equal runs of points, at most MOST_POINTS; not-finite values become gaps."""
    width = math.ceil(max(len(curve.steps), 1) / MOST_POINTS)
    steps, values = [], []
    for start in range(0, len(curve.steps), width):
        part = curve.values[start : start + width]
        finite = [v for v in part if v is not None and math.isfinite(v)]
        steps.append(math.fsum(curve.steps[start : start + width]) / len(part))
        values.append(math.fsum(finite) / len(finite) if len(finite) == len(part) else math.nan)
    return steps, values


def _mean_curve(found: Sequence[tuple[list[float], list[float]]]) -> tuple[list[float], list[float]] | None:
    if any(steps != found[0][0] for steps, _ in found):
        return None
    return found[0][0], [sum(column) / len(column) for column in zip(*(values for _, values in found), strict=True)]


def reliability(series: Sequence[Series], name: str = "reliability") -> Plot | None:
    """Accuracy by confidence, a point a bin of the reliability table, larger for more samples; None where no arm has a table."""
    tables = [(s, [(b.confidence, b.accuracy, b.count) for b in s.arm.bins() if b.confidence is not None and b.accuracy is not None]) for s in series]
    shown = [(s, bins) for s, bins in tables if bins]
    if not shown:
        return None
    words = []
    with _drawing() as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.8, linestyle="--")
        for s, bins in shown:
            x, y, counts = ([row[i] for row in bins] for i in range(3))
            axes.plot(x, y, color=s.stroke, linestyle=s.line, linewidth=1, alpha=0.4)
            sizes = [6 + 60 * n / sum(counts) for n in counts]
            axes.scatter(x, y, s=sizes, color=s.stroke, marker=s.marker, edgecolors=PAPER, linewidths=0.6, zorder=3)
            axes.plot([], [], color=s.stroke, marker=s.marker, markersize=5, linestyle=s.line, linewidth=1.1, label=s.label)
            words.append(f"{s.label} has a calibration error of {percent(s.arm.mean('ece'))}")
        axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.04), xlabel="confidence", ylabel="accuracy")
        _percent_ticks(axes, "both")
        _legend(figure, axes)
        alt = "Accuracy by confidence: " + "; ".join(words) + "."
        caption = "On the dashed line confidence and accuracy agree; below it the network is too sure. Larger marks hold more samples."
        return Plot("Reliability", _inline(figure, name, alt), alt, caption)


def per_class(student: Series, reference: Series, classes: Sequence[str], name: str = "classes") -> Plot | None:
    """Accuracy of each class, the reference's and the student's joined by a line, largest loss first; None where either has no such table."""
    mine, other = student.arm.per_class(), reference.arm.per_class()
    if not mine or len(mine) != len(other):
        return None
    names = classes if len(classes) == len(mine) else [str(i) for i in range(len(mine))]
    rows = sorted(((a - b, n, a, b) for a, b, n in zip(mine, other, names, strict=True) if a is not None and b is not None), key=lambda row: row[:2])
    if not rows:
        return None
    total = len(rows)
    caption = f"At the right: {_lower(student.label)} minus {_lower(reference.label)}, in points."
    if total > MOST_CLASSES:
        rows = rows[: MOST_CLASSES // 2] + rows[-MOST_CLASSES // 2 :]
        caption += f" Of {total} classes, the {MOST_CLASSES // 2} with the largest losses and the {MOST_CLASSES // 2} with the largest gains are shown."
    with _drawing(height=0.21 * len(rows) + 0.9) as figure:
        axes = figure.subplots()
        places = range(len(rows), 0, -1)
        axes.hlines(places, [r[2] for r in rows], [r[3] for r in rows], colors=RULE, linewidth=2.2)
        for s, column in ((reference, 3), (student, 2)):
            axes.plot([r[column] for r in rows], places, linestyle="", marker=s.marker, markersize=5, color=s.stroke, markeredgecolor=PAPER, label=s.label)
        for place, row in zip(places, rows, strict=True):
            axes.annotate(signed(row[0] * 100, 1), (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=SOFT)
        axes.set_yticks(list(places), [_short(row[1]) for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.set(ylim=(0.3, len(rows) + 0.7), xlabel="accuracy")
        axes.grid(visible=False, axis="y")
        _percent_ticks(axes, "x")
        _legend(figure, axes)
        worst, best = rows[0], rows[-1]
        alt = (
            f"Accuracy by class, {_lower(student.label)} minus {_lower(reference.label)}, in points: "
            f"from {signed(worst[0] * 100, 1)} ({worst[1]}) to {signed(best[0] * 100, 1)} ({best[1]}), over {total} classes."
        )
        return Plot("Accuracy by class", _inline(figure, name, alt), alt, caption)


def latency(series: Sequence[Series], batch_size: int, name: str = "latency") -> Plot | None:
    """Every measurement of a forward pass as a dot, with the median and the 10th to 90th percentile; None where nothing was timed."""
    shown = [(s, x) for s in series if (x := s.arm.latency(batch_size)) is not None]
    if not shown:
        return None
    with _drawing(height=0.5 * len(shown) + 0.8) as figure:
        axes = figure.subplots()
        for place, (s, timed) in zip(range(len(shown), 0, -1), shown, strict=True):
            ms = [v * 1000 for v in timed.values]
            heights = [place - 0.1 - 0.25 * (i * 0.618034 % 1) for i in range(len(ms))]
            axes.plot(ms, heights, linestyle="", marker="o", markersize=2.8, color=s.stroke, alpha=0.55, markeredgewidth=0)
            axes.plot([timed.p10 * 1000, timed.p90 * 1000], [place, place], color=s.stroke, linewidth=1.4)
            axes.plot([timed.median_s * 1000], [place], color=s.stroke, marker="|", markersize=9, markeredgewidth=2.2, linestyle="")
            axes.annotate(milliseconds(timed.median_s), (timed.median_s * 1000, place + 0.14), ha="center", va="bottom", fontsize=8)
        values = [v for _, timed in shown for v in timed.values]
        if max(values) > 4 * min(values):
            _logarithmic(axes, "x")
        axes.set_yticks(list(range(len(shown), 0, -1)), [fill(_short(s.label, 44), 22) for s, _ in shown])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set(ylim=(0.5, len(shown) + 0.6), xlabel="ms a batch")
        axes.margins(x=0.12)
        axes.grid(visible=False, axis="y")
        spread = (f"{s.label} {milliseconds(x.median_s)}, mostly {milliseconds(x.p10)} to {milliseconds(x.p90)}" for s, x in shown)
        alt = f"Latency of a batch of {batch_size}, median: " + "; ".join(spread) + "."
        caption = f"{len(shown[0][1].values)} measurements each, taken in turns. The line runs from the 10th to the 90th percentile."
        return Plot(f"Latency, batch {batch_size}", _inline(figure, name, alt), alt, caption)


def accuracy_by_size(series: Sequence[Series], name: str = "size") -> Plot | None:
    """Accuracy against bytes on disk (parameters where bytes are unknown), with standard errors; None for fewer than two arms."""
    by_bytes = all(s.arm.bytes for s in series)
    shown = []
    for s in series:
        mean, amount = s.arm.mean("accuracy"), s.arm.bytes if by_bytes else s.arm.parameters
        if mean and amount:
            shown.append((s, amount / 1024 if by_bytes else amount, *mean))
    if len(shown) < 2:
        return None
    with _drawing() as figure:
        axes = figure.subplots()
        for s, x, accuracy, error in shown:
            axes.errorbar(x, accuracy, yerr=error or None, color=s.stroke, marker=s.marker, markersize=6, linestyle="", capsize=2.5, elinewidth=1.2)
            axes.plot([], [], color=s.stroke, marker=s.marker, markersize=6, linestyle="", label=s.label)
        _logarithmic(axes, "x")
        axes.set(xlabel="KiB on disk" if by_bytes else "parameters", ylabel="accuracy")
        _percent_ticks(axes, "y")
        axes.margins(x=0.12, y=0.18)
        _legend(figure, axes)
        unit = "KiB" if by_bytes else "parameters"
        alt = "Accuracy against size: " + "; ".join(f"{s.label} {percent((m, e))} with {number(x)} {unit}" for s, x, m, e in shown) + "."
        return Plot("Accuracy against size", _inline(figure, name, alt), alt, "Bars are one standard error over the seeds.")


@dataclass(frozen=True)
class Ladder:
    """A teacher with several samplers, from many network calls to few, and the student that takes their place."""

    label: str
    rungs: tuple[Series, ...]
    student: Series | None


def ladder(label: str, series: Sequence[Series]) -> Ladder:
    """The arms of one run as a ladder: everything but the student is a rung."""
    student = next((s for s in series if s.arm.role == "distilled"), None)
    return Ladder(label, tuple(s for s in series if s.arm.role != "distilled"), student)


def quality_by_cost(ladders: Sequence[Ladder], quality: Measure, cost: Measure, name: str) -> Plot | None:
    """Quality against what a sample costs: a line through a teacher's rungs, a mark for its student, a dot for each of its seeds.

    None where fewer than two arms have both measures.
    """
    factor = 1000.0 if cost.unit == "seconds" else 1.0
    words, values, best = [], [], []
    with _drawing() as figure:
        axes = figure.subplots()
        for ladder in ladders:
            rungs = sorted((point for s in ladder.rungs if (point := _placed(s, quality, cost))), key=lambda point: point[1])
            if rungs:
                line, scale = ladder.rungs[0], quality.factor
                axes.plot([c * factor for _, c, _, _ in rungs], [v * scale for _, _, v, _ in rungs], color=line.stroke, linestyle=line.line, linewidth=1.2)
                axes.plot([], [], color=line.stroke, linestyle=line.line, marker="o", markersize=5, linewidth=1.2, label=ladder.label)
            for s, c, v, error in rungs:
                own = s.arm.role == "alone"
                marker = s.marker if own else "o"
                axes.errorbar(c * factor, v * quality.factor, yerr=(error or 0) * quality.factor or None, color=s.stroke if own else ladder.rungs[0].stroke,
                              marker=marker, markersize=7 if own else 5, linestyle="", capsize=2.5, elinewidth=1.2)  # fmt: skip
                if own and len(ladders) == 1:
                    axes.plot([], [], color=s.stroke, marker=marker, markersize=7, linestyle="", label=s.label)
                if s.arm.role == "teacher":
                    best.append((v * quality.factor, s.stroke))
            placed = _placed(ladder.student, quality, cost) if ladder.student is not None else None
            if placed is not None:
                s, c, v, error = placed
                seeds = [x * quality.factor for x in s.arm.values(quality.key)]
                axes.plot([c * factor] * len(seeds), seeds, linestyle="", marker="o", markersize=3.5, color=s.stroke, alpha=0.5, markeredgewidth=0)
                axes.errorbar(c * factor, v * quality.factor, yerr=(error or 0) * quality.factor or None, color=s.stroke, marker=s.marker, markersize=8,
                              linestyle="", capsize=3, elinewidth=1.4, markeredgecolor=PAPER, zorder=3)  # fmt: skip
                axes.plot([], [], color=s.stroke, marker=s.marker, markersize=8, linestyle="", label=s.label)
                values += seeds
            for s, c, v, error in [*rungs, *([placed] if placed else [])]:
                values.append(v * quality.factor)
                words.append(f"{s.label} {shown(quality, (v, error))} at {shown(cost, (c, None))}")
        if len(words) < 2:
            return None
        for level, stroke in best:
            axes.axhline(level, color=stroke, linewidth=0.8, linestyle=":", zorder=1)
        axes.margins(x=0.1, y=0.12)
        _logarithmic(axes, "x")
        if 0 < min(values) < max(values) / 20:
            _logarithmic(axes, "y")
        axes.set(xlabel="ms a sample" if cost.unit == "seconds" else cost.name, ylabel=quality.heading)
        if quality.unit == "percent":
            _percent_ticks(axes, "y")
        _legend(figure, axes)
        alt = f"{quality.label} against {cost.name}: " + "; ".join(words) + "."
        caption = (
            f"The line joins the teacher’s samplers, the dotted one is its best. {_better(quality)}"
            "Bars are one standard error over the seeds, small dots the student’s seeds."
        )
        title = f"{quality.label} against {'time' if cost.unit == 'seconds' else 'network calls'}"
        return Plot(title, _inline(figure, name, alt), alt, caption)


def _placed(s: Series, quality: Measure, cost: Measure) -> tuple[Series, float, float, float | None] | None:
    """The arm with its cost, quality and standard error; None where one is unknown or the cost has no logarithm."""
    value, price = s.arm.mean(quality.key), s.arm.mean(cost.key)
    if value is None or price is None or not math.isfinite(value[0]) or not 0 < price[0] < math.inf:
        return None
    return s, price[0], *value


def _better(measure: Measure) -> str:
    return {"lower": "Lower is better. ", "higher": "Higher is better. ", "none": ""}[measure.better]


@contextmanager
def _drawing(height: float = HEIGHT) -> Iterator[Figure]:
    """A figure in the report's style; a glyph that matplotlib's own font lacks is the browser's business, not a warning."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield Figure(figsize=(WIDTH, height), layout="constrained")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 3 if sum(map(len, labels)) <= 46 and len(labels) <= 3 else 2 if max(map(len, labels)) <= 24 else 1
        shown = [_short(label, 48) for label in labels]
        figure.legend(handles, shown, loc="outside upper left", ncols=columns, fontsize=9, handlelength=1.6, columnspacing=1.2)
        figure.set_figheight(figure.get_figheight() + 0.18 * (math.ceil(len(labels) / columns) - 1))  # so that a long legend takes nothing from the plot


def _percent_ticks(axes: Axes, which: str) -> None:
    from matplotlib.ticker import FuncFormatter

    for axis in [axes.xaxis] * (which in ("x", "both")) + [axes.yaxis] * (which in ("y", "both")):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.4g}{NBSP}%"))


def _logarithmic(axes: Axes, which: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    """A number for an axis: 0.5, 200, 20k, 5M."""
    power = next((p for p in (9, 6, 3) if abs(value) >= 10 ** (p + 1)), 0)
    return f"{value / 10**power:g}{ {0: '', 3: 'k', 6: 'M', 9: 'G'}[power] }".replace("-", MINUS)


def _short(text: str, most: int = 26) -> str:
    printable = "".join(c for c in text if c.isprintable())
    return printable if len(printable) <= most else f"{printable[: most - 9]}…{printable[-8:]}"


def _lower(label: str) -> str:
    return label[:1].lower() + label[1:]


def _inline(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as an <svg> element for an HTML page: no metadata or links, colours by variable, ids only where used and unique by `name`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    used = set(re.findall(r"#([\w.-]+)", " ".join(v for e in root.iter() for k, v in e.attrib.items() if k.endswith(("href", "clip-path")))))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {k.rpartition("}")[2]: v for k, v in element.attrib.items()}
        _tidy(element.attrib, name, used)
        if not (element.text or "").strip():
            element.text = None
        element.tail = None
    box = root.attrib["viewBox"]
    root.attrib = {"viewBox": box, "role": "img", "aria-label": alt}
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # ElementTree has escaped every text and attribute


def _tidy(attributes: dict[str, Any], name: str, used: set[str]) -> None:
    identity = attributes.pop("id", None)
    if identity in used:
        attributes["id"] = f"{name}-{identity}"
    if "href" in attributes:
        attributes["href"] = f"#{name}-{attributes['href'].removeprefix('#')}"
    if "clip-path" in attributes:
        attributes["clip-path"] = attributes["clip-path"].replace("url(#", f"url(#{name}-")
    if "style" in attributes:
        style = re.sub(r"font: (?:[a-z0-9]+ )*?([\d.]+)px[^;]*", r"font-size: \1px", attributes["style"])
        style = re.sub(r"font-family:[^;]*(; )?", "", style)
        attributes["style"] = re.sub(r"#[0-9a-f]{6}", lambda m: VARIABLES.get(m.group(), m.group()), style)
    if "d" in attributes:
        attributes["d"] = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m.group()):.2f}".rstrip("0").rstrip("."), " ".join(attributes["d"].split()))
    if attributes.get("transform", "").startswith("rotate(-0 "):
        del attributes["transform"]
    for key in ("x", "y"):
        if key in attributes:
            attributes[key] = f"{float(attributes[key]):.2f}"
