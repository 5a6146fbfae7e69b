"""Images in several views; the oracle is the image processor, and the images themselves."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from datasets import Dataset, Features, List, Value
from PIL import Image
from test_transfer_set import vit

from hf_distill.tasks import Task
from hf_distill.teachers.rows import row_lengths
from hf_distill.transfer import ImageRows

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


class TestImageRows:
    ROWS = Dataset.from_dict(
        {"pixel_values": np.random.default_rng(0).random((6, 1, 8, 8)).tolist(), "label": [0, 1] * 3},
        Features({"pixel_values": List(List(List(Value("float32")))), "label": Value("int64")}),
    )
    TASK = Task.of(vit(), ROWS)

    def test_the_first_view_is_the_image_and_each_is_read_the_same_again(self):
        rows = ImageRows(self.TASK, self.ROWS, None, views=3)
        assert len(rows) == 18
        for k in range(18):
            assert torch.equal(rows[k]["pixel_values"], rows[k]["pixel_values"])
        for k, image in enumerate(self.ROWS["pixel_values"]):
            assert torch.equal(rows[k]["pixel_values"], torch.tensor(image))

    def test_every_second_view_lies_between_two_images(self):
        rows = ImageRows(self.TASK, self.ROWS, None, views=3)
        known = set(np.asarray(self.ROWS["pixel_values"], np.float32).ravel().tolist())
        shifted = {float(x) for k in range(6, 12) for x in rows[k]["pixel_values"].ravel()}
        mixed = {float(x) for k in range(12, 18) for x in rows[k]["pixel_values"].ravel()}
        assert shifted <= known
        assert not mixed <= known
        assert min(known) <= min(mixed)
        assert max(mixed) <= max(known)

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
    def test_pictures_of_any_mode_are_read_whatever_transform_is_set(self, mode):
        colours = np.random.default_rng(0).integers(0, 255, (2, 10, 12, 3), np.uint8)
        pictures = [Image.fromarray(array).convert(mode) for array in colours]
        rows = Dataset.from_dict({"image": pictures, "label": [0, 1]}).cast_column("image", datasets.Image())
        reader = hf.ViTImageProcessor(size={"height": 8, "width": 8})
        expected = reader(pictures[1].convert("RGB"), return_tensors="pt")["pixel_values"][0]
        for dataset in (rows, rows.with_transform(lambda some: {"label": some["label"]})):
            found = ImageRows(Task.of(vit(), dataset), dataset, reader)[1]
            torch.testing.assert_close(found["pixel_values"], expected)
            assert found["labels"] == 1

    @pytest.mark.parametrize("mode", ["RGB", "LA", "L"])
    def test_a_reader_of_one_channel_gets_grey_pictures(self, mode):
        colours = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8)
        pictures = [Image.fromarray(array).convert(mode) for array in colours]
        rows = Dataset.from_dict({"image": pictures, "label": [0, 1]}).cast_column("image", datasets.Image())
        reader = hf.ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
        found = ImageRows(Task.of(vit(), rows), rows, reader)[1]["pixel_values"].squeeze()
        grey = torch.tensor(np.asarray(pictures[1].convert("L"), np.float32))
        torch.testing.assert_close(found, grey / 255 / 0.5 - 1, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("decode", [True, False])
    def test_pictures_that_are_not_there_or_not_decoded_are_refused(self, decode):
        picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
        rows = Dataset.from_dict({"image": [None if decode else picture], "label": [0]})
        rows = rows.cast_column("image", datasets.Image()).cast_column("image", datasets.Image(decode=decode))
        with pytest.raises(ValueError, match="Row 0 of 'image' holds no decoded image, got"):
            ImageRows(Task.of(vit(), rows), rows, hf.ViTImageProcessor(size={"height": 8, "width": 8}))[0]

    def test_pictures_may_be_arrays(self):
        arrays = np.random.default_rng(0).integers(0, 255, (2, 10, 12, 3), np.uint8)
        rows = Dataset.from_dict({"image": arrays.tolist(), "label": [0, 1]})
        reader = hf.ViTImageProcessor(size={"height": 8, "width": 8}, resample=0)
        expected = reader(Image.fromarray(arrays[0]), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(ImageRows(Task.of(vit(), rows), rows, reader)[0]["pixel_values"], expected)

    def test_grey_pictures_may_be_arrays_too(self):
        arrays = np.random.default_rng(0).integers(0, 255, (2, 10, 12), np.uint8)
        rows = Dataset.from_dict({"image": arrays.tolist(), "label": [0, 1]})
        reader = hf.ViTImageProcessor(size={"height": 8, "width": 8}, resample=0)
        expected = reader(Image.fromarray(arrays[0]).convert("RGB"), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(ImageRows(Task.of(vit(), rows), rows, reader)[0]["pixel_values"], expected)

    def test_labels_come_only_with_the_images_themselves(self):
        assert ImageRows(self.TASK, self.ROWS, None)[1]["labels"] == 1
        assert "labels" not in ImageRows(self.TASK, self.ROWS, None, views=2)[1]

    def test_no_image_is_read_to_learn_how_long_its_text_is(self, monkeypatch):
        rows, read = ImageRows(self.TASK, self.ROWS, None), []
        whole = ImageRows.__getitem__
        monkeypatch.setattr(ImageRows, "__getitem__", lambda self, k: read.append(k) or whole(self, k))
        assert row_lengths(rows).tolist() == [0] * 6
        assert read == [0]

    @pytest.mark.parametrize("limit", ["bytes", "free memory", "free memory of two workers"])
    @pytest.mark.parametrize("images", [0, 4, 6])
    def test_as_many_images_as_there_is_room_for_are_processed_once_and_never_changed(
        self, images, limit, monkeypatch
    ):
        read = [row["pixel_values"] for row in ImageRows(self.TASK, self.ROWS, None, views=3)]
        room = images * 8 * 8 * 4 + 1
        if limit == "bytes":
            monkeypatch.setattr("hf_distill.transfer.views.KEPT_BYTES", room)
        else:
            workers = SimpleNamespace(num_workers=2) if "workers" in limit else None
            monkeypatch.setattr("torch.utils.data.get_worker_info", lambda: workers)
            free = SimpleNamespace(available=8 * room * (2 if workers else 1))
            monkeypatch.setattr("psutil.virtual_memory", lambda: free)
        whole, processed = ImageRows._processed, []
        monkeypatch.setattr(ImageRows, "_processed", lambda self, row: processed.append(row) or whole(self, row))
        rows = ImageRows(self.TASK, self.ROWS, None, views=3)
        for _ in range(2):
            for k in range(len(rows)):
                assert torch.equal(rows[k]["pixel_values"], read[k])
        assert sorted(row for row in range(6) if processed.count(row) == 1) == list(range(images))
