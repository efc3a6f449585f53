import numpy as np
import pytest
import torch
from PIL import Image

from vitcmp.configs import UserError
from vitcmp.data.pictures import prepare_image


def saved(path, array, **options):
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)
    return path


def test_a_picture_of_the_right_size_is_kept_to_the_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3))
    tensor = prepare_image(saved(tmp_path / "a.png", pixels), 3, (6, 4))
    assert tensor.dtype == torch.uint8
    assert tensor.permute(1, 2, 0).tolist() == pixels.tolist()


def test_grey_becomes_colour_and_colour_grey(tmp_path):
    grey = saved(tmp_path / "grey.png", np.full((8, 8), 77))
    assert prepare_image(grey, 3, (8, 8)).unique().tolist() == [77]
    colour = saved(tmp_path / "colour.png", np.full((8, 8, 3), (255, 0, 0)))
    assert prepare_image(colour, 1, (8, 8)).unique().tolist() == [76]  # 0.299 * 255


def test_the_centre_is_cut_out(tmp_path):
    wide = np.zeros((4, 12))
    wide[:, 4:8] = 200
    assert prepare_image(saved(tmp_path / "wide.png", wide), 1, (4, 4)).unique().tolist() == [200]
    assert prepare_image(saved(tmp_path / "tall.png", wide.T), 1, (4, 4)).unique().tolist() == [200]


def test_the_cameras_orientation_is_respected(tmp_path):
    left_dark = np.full((8, 8), 255)
    left_dark[:, :4] = 0
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: left becomes top
    path = saved(tmp_path / "turned.png", left_dark, exif=exif)
    shown = prepare_image(path, 1, (8, 8))[0]
    assert shown[:4].unique().tolist() == [0]
    assert shown[4:].unique().tolist() == [255]


def test_transparency_shows_white_and_16_bits_are_scaled(tmp_path):
    clear = np.zeros((4, 4, 4))
    assert prepare_image(saved(tmp_path / "clear.png", clear), 3, (4, 4)).unique().tolist() == [255]
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)).save(path)
    assert prepare_image(path, 1, (4, 4)).unique().tolist() == [100]


@pytest.mark.parametrize("name", ["none.png", "folder", "text.png", "empty.jpg", "cut.png"])
def test_what_is_no_picture_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").touch()
    whole = saved(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3))).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=name):
        prepare_image(tmp_path / name, 3, (8, 8))


def test_other_channels_are_refused(tmp_path):
    with pytest.raises(UserError, match="4 channels"):
        prepare_image(saved(tmp_path / "a.png", np.zeros((4, 4))), 4, (4, 4))
