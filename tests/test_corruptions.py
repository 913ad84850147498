"""Each corruption does what its definition says; the whole is the same bytes however the work is divided.

Images are random numbers (smoothed where edges would hide the point), ice is made up. Oracles: colorsys, loops, closed forms.
"""
import colorsys
import io
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from rest_nb import corruptions
from rest_nb.corruptions import (CORRUPTIONS, DISENT, LFF, corrupt, defocus_blur, elastic, fog, frost, gaussian_blur,
                                 motion_blur, plasma, read_textures, sample, snow, spatter)

rng = np.random.default_rng(0)
COARSE = rng.random((6, 9, 9, 3))
AT = np.linspace(0, 7.99, 32)
SMOOTH = sum((1 - abs(AT - i).clip(0, 1))[:, None, None] * (1 - abs(AT - j).clip(0, 1))[None, :, None]
             * COARSE[:, i, j][:, None, None] for i, j in itertools.product(range(9), repeat=2))
PHOTOS = np.rint(SMOOTH * 255).astype(np.uint8)
NOISY = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
ICE = [np.full((40, 50, 3), 100, np.uint8), rng.integers(0, 256, (60, 40, 3), dtype=np.uint8)]
SEVERITIES = range(1, 6)
GREY = np.full((30, 32, 32, 3), 128, np.uint8)


def rngs(n, seed=0): return [np.random.default_rng([seed, i]) for i in range(n)]


def at(kind, severity): return CORRUPTIONS[kind][1][severity - 1]


def changed(images, kind, severity, **words):
    return corrupt(images, kind, severity, textures=ICE, **words).astype(int) - images


# --- the whole

@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_shape_type_and_that_something_happens(kind):
    before = PHOTOS.copy()
    for severity in SEVERITIES:
        spoilt = corrupt(PHOTOS, kind, severity, textures=ICE)
        assert spoilt.shape == PHOTOS.shape and spoilt.dtype == np.uint8
        assert (spoilt != PHOTOS).any((1, 2, 3)).mean() >= .5  # spatter spares an image now and then
    assert (PHOTOS == before).all()


LADDERS = [kind for kind in CORRUPTIONS if kind not in ("saturate", "elastic", "spatter", "snow", "frost")]


@pytest.mark.parametrize("kind", LADDERS)
def test_harder_is_harder(kind):
    """Mean change grows with severity. The other five are no ladders of change: saturate turns round at 3, elastic trades reach
    for strength, spatter changes its matter, snow its wind, frost darkens the image as it adds ice."""
    photos = np.tile(PHOTOS // 2 + NOISY // 2, (5, 1, 1, 1))
    change = [np.abs(changed(photos, kind, severity)).mean() for severity in SEVERITIES]
    assert all(a < b for a, b in zip(change, change[1:])), change


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_bytes_do_not_depend_on_blocks_workers_or_company(kind, monkeypatch):
    images = np.concatenate([PHOTOS, NOISY])
    whole = corrupt(images, kind, 3, seed=7, textures=ICE, workers=1)
    for block, workers in ((1, 3), (5, 2), (100, None)):
        monkeypatch.setattr(corruptions, "BLOCK", block)
        assert (corrupt(images, kind, 3, seed=7, textures=ICE, workers=workers) == whole).all()
    assert (corrupt(images[:7], kind, 3, seed=7, textures=ICE) == whole[:7]).all()
    mixed = np.array(list(CORRUPTIONS), object)[np.arange(12) % 14]
    mixed[4] = kind
    assert (corrupt(images, mixed, 3, seed=7, textures=ICE)[4] == whole[4]).all()


RANDOM = ("gaussian noise", "impulse noise", "frost", "elastic", "snow", "fog", "spatter")


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_seed_and_place_count_where_there_is_chance(kind):
    same, ice = np.repeat(PHOTOS[:1], 8, 0), [rng.integers(0, 256, (90, 90, 3), dtype=np.uint8)]
    spoilt, other = (corrupt(same, kind, 5, seed=seed, textures=ice) for seed in (0, 1))
    assert len({image.tobytes() for image in spoilt}) == (8 if kind in RANDOM else 1)
    assert (spoilt != other).any() == (kind in RANDOM)


def test_each_image_gets_its_own_kind():
    kinds = np.array(["brightness", "contrast", "jpeg", "brightness", "fog", "contrast"])
    mixed = corrupt(PHOTOS, kinds, 4)
    for i, kind in enumerate(kinds): assert (mixed[i] == corrupt(PHOTOS, kind, 4)[i]).all()


def test_no_images_are_no_trouble():
    assert corrupt(PHOTOS[:0], "fog").shape == (0, 32, 32, 3)


@pytest.mark.parametrize("words, said", [
    (dict(kinds="rain"), "corruption is 'rain'; expected one of brightness, contrast"),
    (dict(kinds=["fog"] * 5 + ["rain"]), "corruption is 'rain'"),
    (dict(severity=0), "severity is 0; expected one of 1 to 5"), (dict(severity=6), "severity is 6"),
    (dict(severity=2.5), "severity is 2.5"), (dict(kinds="frost"), "textures are missing"),
    (dict(images=PHOTOS / 255), "images are float64 of shape"),
    (dict(images=PHOTOS[..., 0]), r"\(6, 32, 32\); expected uint8, N×32×32×3"),
    (dict(images=PHOTOS[..., :1]), r"\(6, 32, 32, 1\)"), (dict(images=PHOTOS[:, :28]), r"\(6, 28, 32, 3\)"),
])
def test_what_does_not_fit_is_refused_in_a_line(words, said):
    with pytest.raises(ValueError, match=said) as caught: corrupt(**dict(images=PHOTOS, kinds="fog") | words)
    assert "\n" not in str(caught.value)


def test_the_lists_as_noted():
    "A corruption for each of plane, car, bird, cat, deer, dog, frog, horse, ship, truck."
    assert DISENT == ("brightness", "contrast", "gaussian noise", "frost", "elastic", "gaussian blur", "defocus blur",
                      "impulse noise", "saturate", "pixelate")
    assert LFF == ("snow", "frost", "fog", "brightness", "contrast", "spatter", "elastic", "jpeg", "pixelate", "saturate")
    assert all(len(constants) == 5 for _, constants in CORRUPTIONS.values())


NOTED = """
gaussian noise  .04 / .06 / .08 / .09 / .10
impulse noise   .01 / .02 / .03 / .05 / .07
gaussian blur   .4 / .6 / .7 / .8 / 1
defocus blur    .3 .4 / .4 .5 / .5 .6 / 1 .2 / 1.5 .1
fog             .2 3 / .5 3 / .75 2.5 / 1 2 / 1.5 1.75
frost           1 .2 / 1 .3 / .9 .4 / .85 .4 / .75 .45
snow            .1 .2 1 .6 8 3 .95 / .1 .2 1 .5 10 4 .9 / .15 .3 1.75 .55 10 4 .9 / .25 .3 2.25 .6 12 6 .85 / .3 .3 1.25 .65 14 12 .8
spatter         .62 .1 .7 .7 .5 0 / .65 .1 .8 .7 .5 0 / .65 .3 1 .69 .5 0 / .65 .1 .7 .69 .6 1 / .65 .1 .5 .68 .6 1
contrast        .75 / .5 / .4 / .3 / .15
brightness      .05 / .1 / .15 / .2 / .3
saturate        .3 0 / .1 0 / 1.5 0 / 2 .1 / 2.5 .2
jpeg            80 / 65 / 58 / 50 / 40
pixelate        .95 / .9 / .85 / .75 / .65
elastic         0 0 .08 / .05 .2 .07 / .08 .06 .06 / .1 .04 .05 / .1 .03 .03
"""  # as read in make_cifar_c.py, where elastic's are in units of the image's 32 pixels


def test_constants_as_noted():
    for line in NOTED.strip().splitlines():
        kind, noted = line[:16].strip(), [[float(c) for c in it.split()] for it in line[16:].split("/")]
        if kind == "elastic": noted = [[32 * c for c in it] for it in noted]
        assert np.allclose([np.ravel(it) for it in CORRUPTIONS[kind][1]], noted), kind
    assert len(NOTED.strip().splitlines()) == len(CORRUPTIONS)


# --- colour

def hsv_map(image, change):
    "`change` (h, s, v) pixel by pixel, with colorsys."
    pixels = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in image.reshape(-1, 3) / 255]
    return np.array(pixels).reshape(32, 32, 3) * 255


ODD = np.concatenate([NOISY[0].reshape(-1, 3)[:1000], [[0, 0, 0], [255] * 3, [7] * 3, [255, 0, 0], [0, 255, 255], [1, 0, 0]],
                      np.zeros((18, 3), int)]).reshape(1, 32, 32, 3).astype(np.uint8)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_is_colorsys(severity):
    expected = hsv_map(ODD[0], lambda h, s, v: (h, s, min(v + at("brightness", severity), 1)))
    assert np.abs(corrupt(ODD, "brightness", severity)[0] - expected).max() <= .5001


@pytest.mark.parametrize("severity", SEVERITIES)
def test_saturate_is_colorsys(severity):
    gain, offset = at("saturate", severity)
    expected = hsv_map(ODD[0], lambda h, s, v: (h, min(gain * s + offset, 1), v))
    assert np.abs(corrupt(ODD, "saturate", severity)[0] - expected).max() <= .5001


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_keeps_its_share_of_every_difference(severity):
    for image, original in zip(corrupt(NOISY, "contrast", severity), NOISY):
        mean = np.array([original[..., colour].mean() for colour in range(3)])
        expected = np.clip(mean + at("contrast", severity) * (original - mean), 0, 255)
        assert np.abs(image - expected).max() <= .5001


# --- noise

@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_noise_has_its_variance(severity):
    noise = changed(GREY, "gaussian noise", severity).ravel() / 255
    expected = math.hypot(at("gaussian noise", severity), 1 / 255 / 12 ** .5)
    assert abs(noise.std() / expected - 1) < .01 and abs(noise.mean()) < 1e-3  # n = 92,160: sd to 0.23 %
    assert abs((np.abs(noise) < expected).mean() - .6827) < .02  # a Gaussian's
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < .015


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_hits_its_share(severity):
    spoilt, share = corrupt(GREY, "impulse noise", severity), at("impulse noise", severity)
    assert set(np.unique(spoilt)) == {0, 128, 255}
    for value in (0, 255): assert abs((spoilt == value).mean() - share / 2) < 5 * math.sqrt(share / 2 / spoilt.size)
    hit = spoilt != 128  # each colour by itself: all three of a pixel are as rare as chance has it
    assert abs(hit.all(-1).mean() - share ** 3) < .001


# --- blur

def point(y=16, x=16):
    image = np.zeros((1, 32, 32, 3))
    image[0, y, x] = 1
    return image


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_blur_of_a_point_is_a_gaussian(severity):
    sigma = at("gaussian blur", severity)
    blurred = gaussian_blur(point(), sigma, None)[0, :, :, 0]
    weights = np.exp(-np.arange(-16, 16) ** 2 / (2 * sigma ** 2))
    weights[np.abs(np.arange(-16, 16)) > 4 * sigma + .5] = 0
    assert np.allclose(blurred, np.outer(weights, weights) / weights.sum() ** 2, atol=1e-12)
    flat = np.full((1, 32, 32, 3), .3)
    assert np.allclose(gaussian_blur(flat, sigma, None), .3)  # the edge is no edge
    step = np.zeros((1, 32, 32, 3))
    step[:, 0] = 1  # the edge's pixel goes on beyond it
    assert gaussian_blur(step, 1, None)[0, 0, 16, 0] > .6


@pytest.mark.parametrize("severity", SEVERITIES)
def test_defocus_blur_of_a_point_is_a_disk(severity):
    radius, alias = at("defocus blur", severity)
    disk = {(y, x): 1 for y in range(-3, 4) for x in range(-3, 4) if y * y + x * x <= radius ** 2}
    near = [math.exp(-k * k / (2 * alias ** 2)) for k in (-1, 0, 1)]
    expected = np.zeros((32, 32))
    for (y, x), dy, dx in itertools.product(disk, (-1, 0, 1), (-1, 0, 1)):
        expected[16 + y + dy, 16 + x + dx] += near[dy + 1] * near[dx + 1] / sum(near) ** 2 / len(disk)
    assert np.allclose(defocus_blur(point(), (radius, alias), None)[0, :, :, 1], expected, atol=1e-12)
    assert np.allclose(defocus_blur(np.full((1, 32, 32, 3), .3), (radius, alias), None), .3)


def test_defocus_blur_mirrors_at_the_edge_and_keeps_colours_apart():
    image = np.zeros((1, 32, 32, 3))
    image[0, 1, 1, 2] = 9
    blurred = defocus_blur(image, (1.5, .1), None)
    assert np.isclose(blurred[0, 0, 0, 2], 4) and not blurred[..., :2].any()  # seen four times, at (±1, ±1)


# --- weather

@pytest.mark.parametrize("severity", SEVERITIES)
def test_frost_is_a_weighted_sum(severity):
    image, ice = at("frost", severity)
    spoilt = corrupt(PHOTOS, "frost", severity, textures=ICE[:1])  # all 100
    assert np.abs(spoilt - np.clip(image * PHOTOS + ice * 100, 0, 255)).max() <= .5001


def test_frost_takes_random_pieces_of_all_textures():
    black = np.zeros((200, 32, 32, 3))
    layers = np.rint(frost(black, (1, 1), rngs(200), ICE) * 255).astype(np.uint8)
    plain = (layers == 100).all((1, 2, 3))
    assert 70 < plain.sum() < 130
    corners = {(top, left) for top, left in itertools.product(range(28), range(8))
               if any((layer == ICE[1][top:top + 32, left:left + 32]).all() for layer in layers[~plain])}
    assert len(corners) > 60
    assert len({top for top, _ in corners}) > 20 and len({left for _, left in corners}) == 8


def test_textures_are_read_at_a_fifth_in_their_order(tmp_path):
    for i in range(1, 7):
        picture = np.full((203, 160, 4 if i < 4 else 3), i, np.uint8)
        picture[2::5, 2::5] = 10 * i
        if i < 4: picture[..., 3] = 128  # see-through: ignored
        Image.fromarray(picture).save(tmp_path / (f"frost{i}.png" if i != 6 else "frost6.png"))
    textures = read_textures(tmp_path)
    assert [texture.shape for texture in textures] == [(41, 32, 3)] * 5
    assert [np.unique(texture).tolist() for texture in textures] == [[10], [20], [30], [40], [50]]
    (tmp_path / "frost3.png").unlink()
    with pytest.raises(FileNotFoundError, match="holds 4 of the 5 textures .*fetch frost"): read_textures(tmp_path)


def plasma_by_hand(noise, decay):
    "Diamond-square, point by point; `noise`: 1,023 numbers in -1…1."
    height, step, size, numbers = np.zeros((32, 32)), 32, 100.0 ** 2, iter(noise)
    while step > 1:
        half, places = step // 2, list(itertools.product(range(0, 32, step), repeat=2))
        def ring(y, x, *ways): return sum(height[(y + a) % 32, (x + b) % 32] for a, b in ways) / 4
        square = list(itertools.product((-half, half), repeat=2))
        cross = [(-half, 0), (half, 0), (0, -half), (0, half)]
        for y, x in places: height[y + half, x + half] = ring(y + half, x + half, *square) + size * next(numbers)
        for y, x in places: height[y, x + half] = ring(y, x + half, *cross) + size * next(numbers)
        for y, x in places: height[y + half, x] = ring(y + half, x, *cross) + size * next(numbers)
        step, size = half, size / decay ** 2
    assert len(list(numbers)) == 1
    return (height - height.min()) / (height.max() - height.min())


@pytest.mark.parametrize("decay", [3, 1.75])
def test_plasma_is_diamond_square(decay):
    for i, landscape in enumerate(plasma(rngs(3), decay)):
        noise = 2 * np.random.default_rng([0, i]).random(1024) - 1
        assert np.allclose(landscape, plasma_by_hand(noise, decay), atol=1e-9)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog_thickens_and_never_outshines(severity):
    thick, decay = at("fog", severity)
    x = PHOTOS / 255
    foggy = fog(x, (thick, decay), rngs(6))
    brightest = x.max((1, 2, 3), keepdims=True)
    layer = foggy * (brightest + thick) / brightest - x
    assert np.allclose(layer, layer[..., :1]) and np.allclose([layer.min(), layer.max()], [0, thick])
    assert (foggy <= brightest + 1e-12).all()
    assert not fog(np.zeros((1, 32, 32, 3)), (thick, decay), rngs(1)).any()


def test_motion_blur_drags_to_one_side_along_its_angle():
    layer, weights = point()[..., 0], np.exp(-np.arange(7) ** 2 / 8)
    weights /= weights.sum()
    for angle, (dy, dx) in {-90: (1, 0), 0: (0, -1), 90: (-1, 0), -45: (1, -1), -135: (1, 1)}.items():
        dragged = motion_blur(layer, 3, 2, [angle])[0]
        slant = math.hypot(dy, dx)  # along a diagonal, steps of a pixel's length meet some pixels twice
        assert np.isclose(dragged.sum(), 1) and np.isclose(dragged[16, 16], weights[0])
        on = [(16 + k * dy, 16 + k * dx) for k in range(math.ceil(6 / slant) + 1)]
        assert np.isclose(sum(dragged[place] for place in on), 1)
    assert np.allclose(motion_blur(np.full((2, 32, 32), .3), 14, 12, [-100, -60]), .3)


def test_snow_falls_twice_on_a_paled_image():
    mean, sd, zoom, threshold, radius, sigma, left = at("snow", 5)
    x = np.tile(PHOTOS / 255, (5, 1, 1, 1))
    layer = snow(x, at("snow", 5), rngs(30)) - snow(x, (-9, 0, zoom, threshold, radius, sigma, left), rngs(30))
    assert np.allclose(layer, layer[:, ::-1, ::-1]) and np.allclose(layer, layer[..., :1])  # turned by 180°: itself
    assert layer.min() >= -1e-9 and .05 < layer.mean() < 1
    grey = x @ [.299, .587, .114]
    pale = left * x + (1 - left) * np.maximum(x, grey[..., None] * 1.5 + .5)
    assert np.allclose(snow(x, (-9, 0, zoom, threshold, radius, sigma, left), rngs(30)), pale)
    upright = np.abs(np.diff(layer[..., 0], axis=1)).mean() < .6 * np.abs(np.diff(layer[..., 0], axis=2)).mean()
    assert upright  # streaks run down, not across


@pytest.mark.parametrize("severity", [4, 5])
def test_mud_covers_and_leaves_the_rest(severity):
    x, mud = np.tile(PHOTOS / 255, (5, 1, 1, 1)), np.array([63, 42, 20]) / 255
    share = spatter(np.ones_like(x), at("spatter", severity), rngs(30))  # white: 1 - share + share·mud
    share = (1 - share) / (1 - mud)
    assert np.allclose(share, share[..., :1]) and .5 < (share == 0).all(-1).mean() < .999
    assert share[share > 1e-9].min() > .8 - 1e-9 and share.max() < 1 + 1e-9
    assert np.allclose(spatter(x, at("spatter", severity), rngs(30)), x * (1 - share) + mud * share)


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_water_is_pale_turquoise_light(severity):
    light, strength = spatter(np.zeros((30, 32, 32, 3)), at("spatter", severity), rngs(30)), at("spatter", severity)[4]
    assert np.allclose(light[..., 1], light[..., 2]) and np.allclose(light[..., 0] * 238, light[..., 1] * 175)
    assert light.min() == 0 and np.isclose(light[..., 1].max(), strength * 238 / 255)  # the brightest place of a drop
    assert .5 < (light[..., 1] == 0).mean() < 1
    x = PHOTOS / 255
    assert np.allclose(spatter(x, at("spatter", severity), rngs(6)), x + light[:6])


def test_dry_where_there_is_no_drop():
    x = PHOTOS / 255
    assert (spatter(x, (0, 0, 1, .7, .5, 0), rngs(6)) == x).all()


# --- digital

@settings(deadline=None, max_examples=40, derandomize=True)
@given(*[hnp.arrays(float, (1, 32, 32), elements=st.floats(0, 31))] * 2)
def test_sample_reads_between_pixels(rows, columns):
    "Of an image that is a plane, any point is what the plane says."
    y, x = np.mgrid[:32, :32]
    plane = np.stack([y + 2 * x, 3 * y - x, 0 * y + 5], -1)[None].astype(float)
    expected = np.stack([rows + 2 * columns, 3 * rows - columns, 0 * rows + 5], -1)
    assert np.allclose(sample(plane, rows, columns, "mirror"), expected)


def ramps(n):
    "An image whose first two colours are each pixel's row and column."
    y, x = np.mgrid[:32, :32]
    return np.repeat(np.stack([y, x, 0 * x], -1)[None].astype(float), n, 0)


def test_elastic_moves_three_points_to_where_they_were_drawn():
    reach, n = .9, 40
    came = elastic(ramps(n), (0, 0, reach), rngs(n))
    for i in range(n):
        drawn = reach * (2 * np.random.default_rng([0, i]).random((3, 2)) - 1)
        for (x, y), (dx, dy) in zip([(26, 26), (26, 6), (6, 6)], drawn):  # what was at (x, y) is at (x + dx, y + dy) now
            found = sample(came[i:i + 1], np.full((1, 1, 1), y + dy), np.full((1, 1, 1), x + dx), "mirror")[0, 0, 0]
            assert np.allclose(found[:2], (y, x), atol=1e-6)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_elastic_moves_no_further_than_it_may(severity):
    strength, blur, reach = at("elastic", severity)
    moved = elastic(ramps(50), (strength, blur, 0), rngs(50)) - ramps(50)
    inner = moved[:, 4:-4, 4:-4, :2]
    assert np.abs(inner).max() <= strength + 1e-9
    if strength and blur < 2:  # noise of variance 1/3, averaged over the blur's weights
        weights = np.exp(-np.arange(-9, 10) ** 2 / (2 * blur ** 2))
        weights[np.abs(np.arange(-9, 10)) > 3 * blur + .5] = 0
        weights /= weights.sum()
        expected = strength / 3 ** .5 * (weights ** 2).sum()
        assert abs(inner.std() / expected - 1) < .05
    assert np.abs(moved).max() > 0 or strength == 0
    assert np.allclose(elastic(np.ones((9, 32, 32, 3)), at("elastic", severity), rngs(9)), 1)  # no dark corners


@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_averages_boxes(severity):
    "A large pixel is the mean of those whose middle lies in it, and is shown by those whose middle lies in it."
    small = int(32 * at("pixelate", severity))
    middle = (np.arange(32) + .5) * small / 32
    inside = np.ceil(middle) - 1 == np.arange(small)[:, None]  # bool, small×32; Pillow counts a box's upper end in
    weights = inside / inside.sum(1, keepdims=True)
    boxes = np.einsum("ik,nklc,jl->nijc", weights, NOISY, weights)
    shown = boxes[:, np.floor(middle).astype(int)][:, :, np.floor(middle).astype(int)]
    assert np.abs(corrupt(NOISY, "pixelate", severity) - shown).max() <= 1.01  # two roundings


def test_pixelate_at_a_half_and_jpeg_are_pillows():
    halves = np.rint(NOISY.reshape(6, 16, 2, 16, 2, 3).mean((2, 4))).repeat(2, 1).repeat(2, 2)
    assert np.abs(corruptions.pixelate(NOISY / 255, .5, None) * 255 - halves).max() <= 1.01
    for severity in SEVERITIES:
        Image.fromarray(PHOTOS[2]).save(file := io.BytesIO(), "JPEG", quality=at("jpeg", severity))
        assert (corrupt(PHOTOS, "jpeg", severity)[2] == np.asarray(Image.open(file))).all()
