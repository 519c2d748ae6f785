import base64
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.errors import InputError
from limbeck.report import samples


def opened(picture):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.png_base64))))


def test_a_grid_holds_every_pixel_enlarged_without_smoothing():
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = samples.image_grid(images, 2, caption="c", group="g")
    assert (found.caption, found.group, found.alt) == ("c", "g", "5 images of 8 by 8 pixels, 2 a row")
    sheet = opened(found)
    assert sheet.shape == (3 * (56 + 3) - 3, 2 * (56 + 3) - 3, 4)
    for place in range(5):
        top, left = place // 2 * 59, place % 2 * 59
        cell = sheet[top : top + 56, left : left + 56]
        expected = torch.round(images[place] * 255).permute(1, 2, 0).repeat_interleave(7, 0).repeat_interleave(7, 1).numpy()
        assert np.array_equal(cell[..., :3], expected)
        assert (cell[..., 3] == 255).all()
    assert (sheet[:, 56:59, 3] == 0).all()  # a gap
    assert (sheet[2 * 59 :, 59:, 3] == 0).all()  # the place of a sixth image


def test_grey_images_that_leave_the_range_and_broken_ones():
    images = torch.tensor([-1.0, 0.5, 2.0, float("nan")]).reshape(4, 1, 1, 1).expand(4, 1, 64, 64)
    found = samples.image_grid(images, 9)
    sheet = opened(found)
    assert sheet.shape == (64, 4 * 66 - 2, 2)  # not enlarged; no more columns than images
    assert [int(sheet[0, i * 66, 0]) for i in range(4)] == [0, 128, 255, 0]
    assert found.alt == "4 images of 64 by 64 pixels, 4 a row; 1 of them holds values that are not finite"
    assert samples.image_grid(images, alt="words").alt.startswith("words; 1 of them")


def test_a_grid_too_wide_is_reduced():
    sheet = opened(samples.image_grid(torch.rand(8, 3, 256, 256), 8))
    assert sheet.shape[1] == samples.WIDEST
    assert 130 < sheet.shape[0] < 150


@pytest.mark.parametrize(("shape", "columns"), [((0, 3, 8, 8), 8), ((2, 2, 8, 8), 8), ((2, 8, 8), 8), ((2, 1, 8, 8), 0)])
def test_what_makes_no_grid_is_refused(shape, columns):
    with pytest.raises(InputError):
        samples.image_grid(torch.zeros(shape), columns)


def test_clouds_stand_in_equal_axes():
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(500, 2, generator=generator)
    stray = torch.cat([real, torch.full((7, 2), 1e6), torch.full((2, 2), float("nan"))])
    found = samples.scatter({"data": real, "teacher": real, "student": stray})
    assert found.alt == "Points in the plane: data, teacher, student (9 of 509 points outside the axes)"
    sheet = opened(found)
    assert sheet.shape[1] == pytest.approx(3 * samples.PANEL * samples.DPI, abs=2)
    assert (sheet[..., 3] == 0).mean() > 0.4  # transparent paper, for light and dark
    assert found == samples.scatter({"data": real, "teacher": real, "student": stray})  # the same bytes


def test_a_collapsed_cloud_looks_other_than_the_data():
    """The third panel of a collapsed student holds its colour in one place only; the data's grey stays behind it."""
    real = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))

    def coloured(points):
        sheet = opened(samples.scatter({"data": real, "student": points})).astype(int)
        return ((sheet[..., 2] - sheet[..., 0] > 20) & (sheet[..., 3] > 60)).sum()

    assert coloured(real) > 20 * coloured(torch.full((2000, 2), 0.5))


def test_limits_and_many_panels():
    clouds = {f"cloud {i}": torch.randn(30, 2, generator=torch.Generator().manual_seed(i)) for i in range(6)}
    sheet = opened(samples.scatter(clouds, limits=((-3.0, 3.0), (-3.0, 3.0)), alt="six clouds"))
    assert sheet.shape[0] > sheet.shape[1] / 2  # two rows
    beyond = torch.tensor([[9.0, 0.0], [-9.0, 0.0], [0.0, 9.0], [0.0, -9.0], [0.0, 0.0]])
    assert "(4 of 5 points outside the axes)" in samples.scatter({"a": beyond}, limits=((-3.0, 3.0), (-3.0, 3.0))).alt
    one = samples.scatter({"$x^2$ \x00": torch.zeros(1, 2)})
    assert opened(one).size


@pytest.mark.parametrize("clouds", [{}, {"a": torch.zeros(3, 3)}, {"a": torch.zeros(3)}, {"a": torch.full((2, 2), float("nan"))}, {"a": torch.zeros(0, 2)}])
def test_what_makes_no_scatter_is_refused(clouds):
    with pytest.raises(InputError):
        samples.scatter(clouds)


def test_importing_the_pictures_imports_nothing_heavy():
    code = (
        "import sys, limbeck.report.samples, limbeck.report.html; print(sorted({'torch', 'numpy', 'matplotlib', 'PIL', 'scipy', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
