"""Pictures of samples for a report: grids of images, and clouds of points in equal axes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from limbeck.errors import InputError
from limbeck.report.summary import Picture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

CELL = 56
"""Pixels that the longer side of a small image is enlarged to, at least."""
WIDEST = 1120
"""Pixels that a grid is wide, at most; larger images are reduced."""
MOST_POINTS = 2500
INK, REAL = "#7d848d", "#8b9099"
DOTS = ("#6b7d99", "#0f9484", "#c2651a", "#7a4fd0", "#b3265e", "#2464c8", "#64841c", "#8c5a3c")
PANEL, ROW = 2.6, 4
"""Inches of a panel's side, and panels in a row."""
DPI = 110


def image_grid(images_NCHW: Tensor, columns: int = 8, *, alt: str = "", caption: str = "", group: str = "") -> Picture:
    """Images as one PNG, row by row, with transparent gaps; small ones enlarged by whole factors without smoothing.

    Args:
        images_NCHW: [N, 1 or 3, H, W] in [0, 1]; what lies outside is clipped, what is not finite is black and said so. columns: images a row.
        alt: the picture in words ("": their number). caption, group: see `Picture`.

    Raises:
        InputError: no images, other shapes, or no columns.
    """
    import numpy as np
    from PIL import Image

    if images_NCHW.dim() != 4 or not len(images_NCHW) or images_NCHW.shape[1] not in (1, 3):
        raise InputError(f"images must be [N, 1 or 3, H, W], these are {list(images_NCHW.shape)}.", where="images")
    if columns < 1:
        raise InputError(f"a grid cannot have {columns} columns.", where="columns")
    values = images_NCHW.detach().cpu().double().numpy()
    broken = int((~np.isfinite(values)).any(axis=(1, 2, 3)).sum())
    pixels = np.rint(np.clip(np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0), 0, 1) * 255).astype(np.uint8)
    count, channels, height, width = pixels.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    factor = max(1, -(-CELL // max(height, width)))
    gap = 2 if factor == 1 else 3
    sheet = np.zeros((rows * (height * factor + gap) - gap, columns * (width * factor + gap) - gap, channels + 1), np.uint8)
    for place, image in enumerate(pixels):
        top, left = (place // columns) * (height * factor + gap), (place % columns) * (width * factor + gap)
        enlarged = image.transpose(1, 2, 0).repeat(factor, axis=0).repeat(factor, axis=1)
        sheet[top : top + height * factor, left : left + width * factor, :channels] = enlarged
        sheet[top : top + height * factor, left : left + width * factor, channels] = 255
    picture = Image.fromarray(sheet, "LA" if channels == 1 else "RGBA")
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, max(1, round(picture.height * WIDEST / picture.width))), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    words = alt or f"{count} image{'s' * (count != 1)} of {height} by {width} pixels, {columns} a row"
    if broken:
        words += f"; {broken} of them hold{'s' * (broken == 1)} values that are not finite"
    return Picture(_text(buffer), words, caption, group)


def scatter(
    points_by_label: Mapping[str, Tensor],
    *,
    limits: tuple[tuple[float, float], tuple[float, float]] | None = None,
    alt: str = "",
    caption: str = "",
    group: str = "",
) -> Picture:
    """Clouds of points side by side in the same axes, one panel a label; behind the later ones stands the first cloud, the real data, in grey.

    Args:
        points_by_label: label → [N, 2], in the order of the panels. At most MOST_POINTS of each are drawn, the first ones.
        limits: (from, to) of each axis; None: what the first cloud spans, and a little more. Points beyond them are counted under their panel.
        alt: the picture in words ("": the labels and the points outside). caption, group: see `Picture`.

    Raises:
        InputError: no clouds, an empty first cloud without limits, or points that are not [N, 2].
    """
    import matplotlib
    from matplotlib.figure import Figure

    clouds = {label: _checked(label, points) for label, points in points_by_label.items()}
    if not clouds:
        raise InputError("there are no points to draw.", where="points_by_label")
    (x_low, x_high), (y_low, y_high) = limits or _span(next(iter(clouds.values())))
    columns = min(len(clouds), ROW)
    rows = -(-len(clouds) // columns)
    style: dict[Any, object] = {"text.parse_math": False, "font.size": 10, "text.color": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK}
    said = []
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(columns * PANEL, rows * (PANEL + 0.35)), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).reshape(-1)
        real = next(iter(clouds.values()))[:MOST_POINTS]
        for number, (axes, (label, points)) in enumerate(zip(panels, clouds.items(), strict=False)):
            inside = (points[:, 0] >= x_low) & (points[:, 0] <= x_high) & (points[:, 1] >= y_low) & (points[:, 1] <= y_high)  # NaN is outside
            outside = len(points) - int(inside.sum())
            if number:
                axes.scatter(real[:, 0], real[:, 1], s=3, color=REAL, alpha=0.25, linewidths=0)
            kept = points[:MOST_POINTS][inside[:MOST_POINTS]]
            axes.scatter(kept[:, 0], kept[:, 1], s=4, color=DOTS[(number - 1) % len(DOTS)] if number else REAL, alpha=0.6, linewidths=0)
            axes.set(xlim=(x_low, x_high), ylim=(y_low, y_high), aspect="equal")
            axes.set_title("".join(c for c in label if c.isprintable()), fontsize=10)
            axes.set_facecolor("none")
            if outside:
                axes.set_xlabel(f"{outside} of {len(points)} outside", fontsize=9, color=INK)
            said.append(label + (f" ({outside} of {len(points)} points outside the axes)" if outside else ""))
        for axes in panels[len(clouds) :]:
            axes.set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, transparent=True, metadata={"Software": None})
    return Picture(_text(buffer), alt or "Points in the plane: " + ", ".join(said), caption, group)


def _checked(label: str, points: Tensor) -> NDArray[np.float64]:
    if points.dim() != 2 or points.shape[1] != 2:
        raise InputError(f"points must be [N, 2], '{label}' has {list(points.shape)}.", where="points_by_label")
    found: NDArray[np.float64] = points.detach().cpu().double().numpy()
    return found


def _span(points: NDArray[np.float64]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The axes' limits around a cloud: a square that holds its finite points with a margin of 15 %."""
    import numpy as np

    finite = points[np.isfinite(points).all(axis=1)]
    if not len(finite):
        raise InputError("the first cloud has no finite points, so nothing says what the axes span.", where="points_by_label", fix="Give limits.")
    low, high = finite.min(axis=0), finite.max(axis=0)
    centre, reach = (low + high) / 2, max(float((high - low).max()) / 2, 1e-6) * 1.15
    (left, bottom), (right, top) = (centre - reach).tolist(), (centre + reach).tolist()
    return (left, right), (bottom, top)


def _text(buffer: io.BytesIO) -> str:
    return base64.b64encode(buffer.getvalue()).decode("ascii")
