"""Small pictures in a report; Pillow, which the code does not need, is the oracle."""

import base64
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from hf_distill.reports import DistillationReport
from hf_distill.reports.thumbnails import LONGEST, thumbnail


def read(uri):
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_small_images_arrive_byte_for_byte(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert (read(thumbnail(pixels)) == pixels).all()
    if len(shape) == 3:
        assert (read(thumbnail(Image.fromarray(pixels))) == pixels).all()
        assert (read(thumbnail(pixels.transpose(2, 0, 1))) == pixels).all()


def test_other_numbers_are_stretched_from_black_to_white():
    assert read(thumbnail(np.array([[[-1.0, 0.0], [0.5, 1.0]]]))).tolist() == [[0, 128], [191, 255]]


@pytest.mark.parametrize("image", [np.zeros((900, 300, 3), np.uint8), Image.new("L", (300, 900))])
def test_large_ones_become_small(image):
    height, width = read(thumbnail(image)).shape[:2]
    assert max(height, width) <= LONGEST
    assert height / width == pytest.approx(3, rel=0.1)


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"two or three axes, got the shape \(4,\)"):
        thumbnail(np.zeros(4))


class TestReport:
    LOGITS = np.array([[4.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])

    def report(self, images):
        return DistillationReport.from_outputs(self.LOGITS[:, ::-1].copy(), self.LOGITS, [0, 1, 0, 1], images=images)

    def test_the_page_shows_the_rows_own_images(self):
        images = [np.full((2, 2), 50 * k, np.uint8) for k in range(4)]
        report = self.report(images)
        assert len(report.mistakes) == 4
        page = report.to_html(figures=False)
        for example in report.mistakes:
            row = int(example.text.removeprefix("row "))
            assert (read(example.picture) == images[row]).all()
            assert example.picture in page

    def test_without_images_there_is_none(self):
        assert 'thumbnail" src' not in self.report(None).to_html(figures=False)

    def test_one_image_a_row_is_needed(self):
        with pytest.raises(ValueError, match="one image for each of the 4 test rows, got 3"):
            self.report([np.zeros((2, 2))] * 3)
