"""Many files become one array: Pillow, asked for one file at a time, is the oracle.

Pictures are drawn here; no file of anybody's is needed.
"""
import errno
import io
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageFile

from rest_nb import images
from rest_nb.images import decode, opened, read_images


def picture(seed=0, width=24, height=20):
    "Smooth enough for a JPEG to keep, and unlike in every corner."
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(small).resize((width, height))


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chw(image): return np.asarray(image).transpose(2, 0, 1)


def folder_of(path, n, **options):
    "n pictures in files; the JPEG of the odd ones loses a little."
    files = [path / f"{i:03}.{'jpg' if i % 2 else 'png'}" for i in range(n)]
    for i, file in enumerate(files): picture(i, **options).save(file)
    return files


# --- one array

@pytest.mark.parametrize("workers", [None, 1, 2, 9])
@pytest.mark.parametrize("n", [1, 2, images.CHUNK, 2 * images.CHUNK + 1])
def test_the_array_is_what_pillow_says_file_by_file(tmp_path, n, workers):
    files = folder_of(tmp_path, n)
    found = read_images(files, workers=workers)
    assert found.dtype == np.uint8 and found.shape == (n, 3, 20, 24) and found.flags.c_contiguous
    for image, file in zip(found, files): assert (image == chw(Image.open(file))).all()


def test_order_and_repetition_are_the_callers(tmp_path):
    files = folder_of(tmp_path, 150)
    order = np.random.default_rng(0).integers(0, 150, 300)
    assert (read_images([files[i] for i in order]) == read_images(files)[order]).all()
    assert (read_images(str(file) for file in files) == read_images(files)).all()  # any iterable; text is a path


def test_zip_folder_and_both_are_the_same(tmp_path):
    files = folder_of(tmp_path, 30)
    for name, kind in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", kind) as archive:
            for file in files: archive.write(file, f"deep/er/{file.name}")
    mixed = [[(tmp_path / f"{name}.zip", f"deep/er/{file.name}") for name in ("stored", "deflated")] + [file]
             for file in files]
    mixed = [three[i % 3] for i, three in enumerate(mixed)]
    assert (read_images(mixed) == read_images(files)).all()


def test_each_file_is_decoded_once_and_the_first_twice(tmp_path, monkeypatch):
    "The first tells the size that the array needs."
    seen, real = [], images.decode
    monkeypatch.setattr(images, "decode", lambda *args: (seen.append(0), real(*args))[1])
    read_images(folder_of(tmp_path, 100))
    assert len(seen) == 101


def test_a_zip_is_opened_once(tmp_path, monkeypatch):
    files = folder_of(tmp_path, 70)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for file in files: archive.write(file, file.name)
    seen, real = [], zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args: (seen.append(real(*args)), seen[-1])[1])
    read_images([(tmp_path / "x.zip", file.name) for file in files])
    assert len(seen) == 1 and seen[0].fp is None  # and closed


# --- kinds of files

@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_modes_come_out_as_pillow_converts_them(mode):
    kind = {"CMYK": "JPEG", "YCbCr": "TIFF"}.get(mode, "PNG")
    image = picture().convert(mode)
    data = encoded(image, kind)
    assert Image.open(io.BytesIO(data)).mode == mode
    assert (decode(data) == chw(Image.open(io.BytesIO(data)).convert("RGB"))).all()


def test_grey_is_three_times_the_same_and_keeps_its_values():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (decode(encoded(Image.fromarray(grey))) == grey).all()


def test_alpha_is_dropped():
    image = picture().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    assert (decode(encoded(image)) == chw(picture())).all()


def test_a_palette_with_transparency_keeps_its_colours():
    image = picture().quantize(16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = decode(encoded(image, transparency=3))
    assert (found == chw(image.convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_keep_their_high_byte(kind):
    "A ramp over all 65,536 values stays a ramp: each of 256 values for 256 pixels."
    ramp = np.arange(65536).astype(np.uint16).reshape(256, 256)
    found = decode(encoded(Image.fromarray(ramp), kind))
    assert (found == np.arange(256)[:, None]).all()


@pytest.mark.parametrize("pixels", [np.int32, np.float32])
def test_32_bits_are_refused_by_name(tmp_path, pixels):
    Image.fromarray(np.ones((4, 4), pixels)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"deep\.tif cannot be decoded: its pixels have 32 bits; expected 8 or 16"):
        read_images([tmp_path / "deep.tif"])


ARRAYS = {1: lambda x: x, 2: lambda x: x[:, :, ::-1], 3: lambda x: x[:, ::-1, ::-1], 4: lambda x: x[:, ::-1],
          5: lambda x: x.transpose(0, 2, 1), 6: lambda x: np.rot90(x, -1, (1, 2)),
          7: lambda x: x[:, ::-1, ::-1].transpose(0, 2, 1), 8: lambda x: np.rot90(x, 1, (1, 2))}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_orientation(kind, orientation):
    "What each of EXIF's eight orientations asks for, in numpy's words."
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain, turned = (encoded(picture(), kind, **options) for options in ({}, {"exif": exif}))
    assert (decode(turned) == ARRAYS[orientation](decode(plain))).all()


@pytest.mark.parametrize("size", [1, 7, 20, 64])
def test_resizing_is_pillows_own_antialiased(tmp_path, size):
    files = folder_of(tmp_path, 3)
    found = read_images(files, size)
    for image, file in zip(found, files):
        assert (image == chw(Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BICUBIC))).all()


def test_palettes_are_resized_as_colours():
    "Between index 0, black, and index 1, white, lies grey."
    image = Image.fromarray(np.indices((32, 32)).sum(0).astype(np.uint8) % 2 * 255).convert("P")
    assert 100 < decode(encoded(image), 8).min() <= decode(encoded(image), 8).max() < 155


def test_a_size_makes_unlike_images_alike(tmp_path):
    for side in (8, 9, 30): picture(side, side, side + 3).save(tmp_path / f"{side}.png")
    assert read_images(sorted(tmp_path.iterdir()), size=16).shape == (3, 3, 16, 16)


# --- what cannot be read

def among_good_ones(tmp_path, bad, at=100):
    (tmp_path / "good").mkdir()
    files = folder_of(tmp_path / "good", 150)
    return files[:at] + [bad] + files[at:]


def refused(error, sources, **options):
    with pytest.raises(error) as caught: read_images(sources, **options)
    said = str(caught.value)
    assert len(said.splitlines()) == 1 and type(caught.value) is error and caught.value.__cause__ is None
    return said


@pytest.mark.parametrize("at", [0, 100, 150])
def test_a_missing_file_is_named(tmp_path, at):
    bad = tmp_path / "gone.jpg"
    assert refused(FileNotFoundError, among_good_ones(tmp_path, bad, at)) == f"{bad} is missing"


@pytest.mark.parametrize("content", [b"", b"This is no image.", b"\xff\xd8\xff", b"PK\x03\x04"])
def test_what_is_no_image_is_named(tmp_path, content):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(content)
    said = refused(ValueError, among_good_ones(tmp_path, bad))
    assert said == f"{bad} is no image that Pillow knows"


@pytest.mark.parametrize("kind, options", [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}),
                                           ("BMP", {}), ("GIF", {}), ("TIFF", {})])
def test_cut_short_at_any_byte_is_never_half_an_image(kind, options):
    "Either it raises, or every pixel is there (a PNG may lack its last, empty, chunk)."
    whole = encoded(picture(), kind, **options)
    expected, raised = decode(whole), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for end in range(0, len(whole), 7):
            try: found = decode(whole[:end])
            except Exception: raised += 1
            else: assert (found == expected).all(), end
    assert raised > .9 * len(whole) / 7


@pytest.mark.parametrize("tolerant", [False, True])
def test_cut_short_is_named_even_where_pillow_was_told_to_fill_up(tmp_path, monkeypatch, tolerant):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    bad = tmp_path / "cut.jpg"
    bad.write_bytes((whole := encoded(picture(0, 99, 99), "JPEG"))[:len(whole) * 4 // 5])
    said = refused(ValueError, among_good_ones(tmp_path, bad))
    assert said.startswith(f"{bad} cannot be decoded: image file is truncated")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant  # and other people's setting is left as it was


def test_other_sizes_are_named_both(tmp_path):
    bad = tmp_path / "small.png"
    picture(0, 11, 12).save(bad)
    said = refused(ValueError, files := among_good_ones(tmp_path, bad))
    assert said == f"{bad} is 11×12, {files[0]} is 24×20: give a size to resize all to"


def test_of_several_bad_files_the_first_is_named(tmp_path):
    "Whichever thread meets its own first."
    files = folder_of(tmp_path, 300)
    for i in (290, 70, 135, 299): files[i] = tmp_path / f"gone{i}.png"
    for _ in range(5): assert "gone70.png" in refused(FileNotFoundError, files, workers=5)


def test_no_permission_is_named(tmp_path, monkeypatch):
    "Whoever runs this, root too."
    files, real = folder_of(tmp_path, 3), Path.read_bytes

    def read_bytes(path):
        if path == files[1]: raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert refused(ValueError, files) == f"{files[1]} cannot be read: Permission denied"


def test_no_permission_for_a_zip(tmp_path, monkeypatch):
    def refuse(*args): raise PermissionError(errno.EACCES, "Permission denied", str(args[0]))
    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    assert refused(ValueError, [("x.zip", "a.png")]) == "x.zip cannot be read: Permission denied"


def test_folders_are_no_images(tmp_path):
    assert refused(ValueError, [tmp_path]) == f"{tmp_path} cannot be read: Is a directory"


def test_an_empty_list():
    assert refused(ValueError, []) == "there are no images to read: the list of files is empty"


@pytest.mark.parametrize("size", [0, -3, 2.5, "128"])
def test_sizes_that_are_none(tmp_path, size):
    assert refused(ValueError, folder_of(tmp_path, 1), size=size) == f"size is {size!r}; expected a side of 1 pixel or more"


def flags(tmp_path):
    with zipfile.ZipFile(tmp_path / "flags.zip", "w") as archive: archive.writestr("a.png", encoded(picture()))
    return tmp_path / "flags.zip"


def test_what_is_missing_in_a_zip_is_named(tmp_path):
    path = flags(tmp_path)
    assert refused(FileNotFoundError, [(path, "a.png"), (path, "b.png")]) == f"b.png in {path} is missing"
    assert refused(FileNotFoundError, [("no.zip", "b.png")]) == "no.zip is missing"


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_a_zip_cut_short_anywhere_is_named(tmp_path_factory, data):
    path = flags(tmp_path_factory.mktemp("cut"))
    whole = path.read_bytes()
    path.write_bytes(whole[:data.draw(st.integers(0, len(whole) - 1))])
    assert refused(ValueError, [(path, "a.png")]) == f"{path} is cut short, or no zip: copy it again"


def test_a_damaged_byte_in_a_zip_is_named(tmp_path):
    path = flags(tmp_path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"IDAT") + 10] ^= 1
    path.write_bytes(whole)
    assert refused(ValueError, [(path, "a.png")]).startswith(f"a.png in {path} cannot be read: Bad CRC-32")


def test_bytes_are_the_files_own(tmp_path):
    path = flags(tmp_path)
    (tmp_path / "text").write_bytes(b"abc")
    with opened([tmp_path / "text", (path, "a.png")]) as read:
        assert read(tmp_path / "text") == b"abc" and read((path, "a.png")) == encoded(picture())


def test_progress_is_shown_on_stderr_when_it_takes_long(tmp_path, monkeypatch, capsys):
    files = folder_of(tmp_path, 10)
    read_images(files)
    assert capsys.readouterr() == ("", "")  # nothing where it takes no time
    real = images.tqdm
    monkeypatch.setattr(images, "tqdm", lambda **options: real(**{**options, "delay": 0}))
    read_images(files)
    out, err = capsys.readouterr()
    assert out == "" and "reading images" in err and "10/10" in err
