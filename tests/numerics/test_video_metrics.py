"""Metrics of predicted videos against hand-made numbers, scipy and plain statements."""

import math

import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import scipy.ndimage
import torch
import torchvision
from torch.nn import functional as F

from evaluation.video_quality import (
    change_cosine,
    frechet_distance,
    kernel_distance,
    moving_psnr,
    moving_region,
    psnr,
    ssim,
)
from evaluation.video_quality.clips import resize
from evaluation.video_quality.config import ProbeConfig
from evaluation.video_quality.features import RandomConv3d, random_weights
from evaluation.video_quality.frechet import quick_frechet, set_score
from evaluation.video_quality.i3d import MIXED, InceptionI3d, load_i3d, preprocess
from evaluation.video_quality.lpips import CHANNELS, load_lpips
from evaluation.video_quality.motion import fit_probe
from evaluation.video_quality.weights import read_state_dict
from infra.errors import InputError


def clip_of(random, frames=3, side=24):
    return random.integers(0, 256, (frames, side, side, 3), dtype=np.uint8)


@pytest.fixture
def random():
    return np.random.default_rng(7)


def test_psnr_by_hand():
    truth = np.full((2, 4, 4, 3), 100, np.uint8)
    off = truth.copy()
    off[1] += 10  # squares: 0 in one frame, 100 in the other, so 50 on average
    assert psnr(truth, off) == pytest.approx(10 * math.log10(255**2 / 50), abs=1e-12)
    assert psnr(truth, truth) == 100.0


def test_the_moving_region_is_where_the_truth_leaves_its_first_frame():
    truth = np.zeros((3, 2, 2, 3), np.uint8)
    truth[1, 0, 0] = (0, 21, 0)  # one colour is enough
    truth[2, 1, 1] = (20, 20, 20)  # not above the threshold
    region = moving_region(truth, threshold=20)
    assert np.argwhere(region).tolist() == [[1, 0, 0]]
    shown = truth.copy()
    shown[:, 0, 1] = 255  # wrong where nothing moves: of no account here
    shown[1, 0, 0] = (0, 21, 30)
    assert moving_psnr(truth, shown, region) == pytest.approx(10 * math.log10(255**2 / 300), abs=1e-12)
    still = np.repeat(truth[:1], 3, axis=0)
    assert moving_psnr(still, shown, moving_region(still, threshold=20)) is None


def test_change_cosine_is_a_direction():
    truth = np.full((3, 2, 2, 3), 100, np.uint8)
    truth[2, 0, 0] = 110
    right, wrong, aside = truth.copy(), truth.copy(), truth.copy()
    right[2, 0, 0] = 105  # half the way
    wrong[2, 0, 0] = 90
    aside[2, 0, 0], aside[2, 1, 1] = 110, 110
    assert change_cosine(truth, right) == pytest.approx(1.0)
    assert change_cosine(truth, wrong) == pytest.approx(-1.0)
    assert change_cosine(truth, aside) == pytest.approx(1 / math.sqrt(2))
    assert change_cosine(truth, np.repeat(truth[:1], 3, axis=0)) == 0.0
    assert change_cosine(truth[:2], right[:2]) is None


def test_ssim_equals_a_statement_in_scipy(random):
    truth = clip_of(random)
    noisy = np.clip(truth + random.normal(0, 20, truth.shape), 0, 255).astype(np.uint8)

    def blurred(picture):
        return scipy.ndimage.gaussian_filter(picture, 1.5, truncate=3.5)[5:-5, 5:-5]  # radius 5: 11 taps

    values = []
    for x, y in zip(truth.astype(float), noisy.astype(float), strict=True):
        for colour in range(3):
            a, b = x[..., colour], y[..., colour]
            mu, nu = blurred(a), blurred(b)
            va, vb, vab = blurred(a * a) - mu**2, blurred(b * b) - nu**2, blurred(a * b) - mu * nu
            c1, c2 = 2.55**2, 7.65**2
            values.append(((2 * mu * nu + c1) * (2 * vab + c2) / ((mu**2 + nu**2 + c1) * (va + vb + c2))).mean())
    assert ssim(truth, noisy) == pytest.approx(np.mean(values), abs=1e-12)
    assert ssim(truth, truth) == pytest.approx(1.0)


def test_clips_of_other_shapes_and_too_small_pictures_are_refused(random):
    with pytest.raises(InputError, match=r"shape \(2, 24, 24, 3\) cannot be compared"):
        psnr(clip_of(random), clip_of(random)[:2])
    with pytest.raises(InputError, match="smaller than SSIM's window"):
        ssim(clip_of(random, side=10), clip_of(random, side=10))


def test_frechet_distance_of_gaussians_in_closed_form(random):
    """For commuting covariances the distance is |m1 - m2|^2 + sum (s1 - s2)^2 of the deviations."""
    unit = random.normal(size=(60, 4))
    centred = unit - unit.mean(axis=0)
    white = centred @ np.linalg.inv(np.linalg.cholesky(np.cov(centred, rowvar=False)).T)
    first = white * [1.0, 2.0, 3.0, 0.5]
    second = white * [2.0, 2.0, 1.0, 0.5] + [0.0, 3.0, 0.0, 4.0]
    assert frechet_distance(first, second) == pytest.approx(25 + 1 + 4, abs=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_equals_scipy_sqrtm(random):
    first, second = random.normal(size=(80, 6)) @ random.normal(size=(6, 6)), random.normal(1, 2, size=(50, 6))
    s, t = np.cov(first.T), np.cov(second.T)
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [5, 40])
def test_resamples_use_the_same_distance(random, count):
    first, second = random.normal(size=(count, 12)), random.normal(0.5, 2, size=(count, 12))
    assert quick_frechet(first, second) == pytest.approx(frechet_distance(first, second), abs=1e-4)


def test_kernel_distance_equals_a_double_loop(random):
    first, second = random.normal(size=(9, 5)), random.normal(0.5, 1, size=(7, 5))

    def k(x, y):
        return (x @ y / 5 + 1) ** 3

    def within(rows):
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return sum(k(rows[i], rows[j]) for i, j in pairs) / len(pairs)

    across = sum(k(x, y) for x in first for y in second) / 63
    assert kernel_distance(first, second) == pytest.approx(within(first) + within(second) - 2 * across, rel=1e-12)


@pytest.mark.parametrize("distance", ["frechet", "kernel"])
def test_set_scores_have_intervals_around_the_value_that_shrink_with_the_clips(random, distance):
    def width(count):
        first, second = random.normal(size=(count, 3)), random.normal(0.3, 1, size=(count, 3))
        score = set_score(first, second, distance=distance, num_resamples=60, seed=0, note="frame 0 left out")
        plain = {"frechet": frechet_distance, "kernel": kernel_distance}[distance](first, second)
        assert score.value == pytest.approx(plain)
        assert score.low < score.value < score.high
        assert score.count == count
        assert score.method == "bootstrap of clips, centred; frame 0 left out"
        return score.high - score.low

    assert width(400) < 0.6 * width(40)


def test_sets_of_one_clip_are_refused():
    with pytest.raises(InputError, match="a distance of 1 and 3 clips"):
        frechet_distance(np.zeros((1, 2)), np.zeros((3, 2)))


def test_the_random_network_is_the_same_everywhere_and_sees_order_in_time(random):
    extractor = RandomConv3d()
    # Pinned: another value is another feature, which needs another name.
    assert extractor.digest == "4c09f6402f6f9f249dc948d1f5c60810d060c7b58d0d4690f030115d78179d43"
    first = random_weights()[0]
    assert first.shape == (16, 3, 3, 5, 5)
    assert float(first.abs().max()) <= math.sqrt(6 / 225)
    assert float(first.var()) == pytest.approx(2 / 225, rel=0.1)
    clips = np.stack([clip_of(random, frames=5, side=32) for _ in range(3)])
    features = extractor.features(clips)
    assert features.shape == (3, 224)
    np.testing.assert_array_equal(extractor.features(clips[1:2])[0], features[1])
    assert np.abs(extractor.features(clips[:, [0, 2, 1, 4, 3]]) - features).max() > 1e-3


def random_i3d(seed=0):
    torch.manual_seed(seed)
    model = InceptionI3d()
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "bn.bias")):
            value.normal_(0, 0.1)
        elif name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.5, 1.5)
    return model.eval()


def test_i3d_has_the_published_names_and_sizes():
    """Names and shapes of `i3d_pretrained_400.pt`, as far as they are known."""
    shapes = {name: tuple(value.shape) for name, value in InceptionI3d().state_dict().items()}
    assert shapes["Conv3d_1a_7x7.conv3d.weight"] == (64, 3, 7, 7, 7)
    assert shapes["Conv3d_1a_7x7.bn.running_var"] == (64,)
    assert shapes["Conv3d_2c_3x3.conv3d.weight"] == (192, 64, 3, 3, 3)
    assert shapes["Mixed_3b.b0.conv3d.weight"] == (64, 192, 1, 1, 1)
    assert shapes["Mixed_4e.b1b.conv3d.weight"] == (288, 144, 3, 3, 3)
    assert shapes["Mixed_5c.b3b.bn.weight"] == (128,)
    assert shapes["logits.conv3d.weight"] == (400, 1024, 1, 1, 1)
    assert shapes["logits.conv3d.bias"] == (400,)
    learned = {name for name in shapes if not name.endswith("num_batches_tracked")}
    assert len(learned) == 5 * (3 + 9 * 6) + 2
    assert sum(math.prod(shapes[name]) for name in learned if "running" not in name) == 12_697_264


def plain_unit(weights, name, x, stride=1):
    """TensorFlow's "same": total padding max((ceil(n / s) - 1) * s + k - n, 0), the smaller half first."""
    kernel = weights[f"{name}.conv3d.weight"]
    padding = []
    for size, k in zip(reversed(x.shape[2:]), reversed(kernel.shape[2:]), strict=True):
        total = max((-(-size // stride) - 1) * stride + k - size, 0)
        padding += [total // 2, total - total // 2]
    x = F.conv3d(F.pad(x, padding), kernel, weights.get(f"{name}.conv3d.bias"), stride)
    if f"{name}.bn.weight" not in weights:
        return x
    mean, variance, scale, shift = (
        weights[f"{name}.bn.{key}"][:, None, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / torch.sqrt(variance + 1e-5) * scale + shift).clamp(min=0)


def plain_pool(x, kernel, stride):
    padding = []
    for size, k, s in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        padding += [total // 2, total - total // 2]
    return F.max_pool3d(F.pad(x, padding), kernel, stride)


@torch.no_grad()
def test_i3d_equals_a_plain_statement_of_the_paper(tmp_path, random):
    weights = random_i3d().state_dict()
    path = tmp_path / "i3d.safetensors"
    safetensors.torch.save_file({k: v for k, v in weights.items() if "num_batches" not in k}, path)
    clip = torch.from_numpy(clip_of(random, frames=9, side=40))[None]
    x = preprocess(clip)
    assert x.shape == (1, 3, 9, 224, 224)
    found = load_i3d(path)(x)

    x = plain_pool(plain_unit(weights, "Conv3d_1a_7x7", x, 2), (1, 3, 3), (1, 2, 2))
    x = plain_unit(weights, "Conv3d_2c_3x3", plain_unit(weights, "Conv3d_2b_1x1", x))
    x = plain_pool(x, (1, 3, 3), (1, 2, 2))
    for name in ("3b", "3c", "pool", "4b", "4c", "4d", "4e", "4f", "last pool", "5b", "5c"):
        if name.endswith("pool"):
            k = (3, 3, 3) if name == "pool" else (2, 2, 2)
            x = plain_pool(x, k, (2, 2, 2))
            continue
        block = f"Mixed_{name}"
        branches = [
            plain_unit(weights, f"{block}.b0", x),
            plain_unit(weights, f"{block}.b1b", plain_unit(weights, f"{block}.b1a", x)),
            plain_unit(weights, f"{block}.b2b", plain_unit(weights, f"{block}.b2a", x)),
            plain_unit(weights, f"{block}.b3b", plain_pool(x, (3, 3, 3), (1, 1, 1))),
        ]
        x = torch.cat(branches, dim=1)
    assert x.shape == (1, 1024, 2, 7, 7)
    expected = weights["logits.conv3d.weight"][:, :, 0, 0, 0] @ x.mean(dim=(2, 3, 4))[0] + weights["logits.conv3d.bias"]
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
    assert len(MIXED) == 9


def test_i3d_sees_the_middle_of_the_picture_at_224():
    wide = torch.zeros(1, 9, 112, 150, 3, dtype=torch.uint8)
    wide[:, :, :, 75 - 56 : 75 + 56] = 255  # exactly the crop's half-size
    seen = preprocess(wide)
    assert seen.shape == (1, 3, 9, 224, 224)
    assert float(seen[..., 4:-4].min()) == 1.0
    assert float(preprocess(torch.zeros(1, 9, 30, 30, 3, dtype=torch.uint8)).max()) == -1.0


def test_short_clips_and_unfit_weights_are_one_line(tmp_path):
    with pytest.raises(InputError, match="at least 9 frames, these count 8"):
        InceptionI3d()(torch.zeros(1, 3, 8, 224, 224))
    with pytest.raises(InputError, match=r"weights .*missing\.pt do not exist"):
        load_i3d(tmp_path / "missing.pt")
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other.pt does not fit: Conv3d_1a_7x7.conv3d.weight is missing"):
        load_i3d(tmp_path / "other.pt")


def test_programs_and_objects_are_not_weights(tmp_path):
    traced = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    torch.jit.save(traced, str(tmp_path / "i3d_torchscript.pt"))
    with pytest.raises(InputError, match="is a TorchScript archive, a program"):
        read_state_dict(tmp_path / "i3d_torchscript.pt")
    torch.save({"weights": pytest}, tmp_path / "object.pt", pickle_module=__import__("cloudpickle"))
    with pytest.raises(InputError, match="is not a file of plain tensors"):
        read_state_dict(tmp_path / "object.pt")
    (tmp_path / "noise.safetensors").write_bytes(b"no header at all")
    with pytest.raises(InputError, match="is no safetensors file"):
        read_state_dict(tmp_path / "noise.safetensors")


@torch.no_grad()
def test_lpips_equals_a_statement_over_torchvision_alexnet(tmp_path, random):
    torch.manual_seed(0)
    alexnet = torchvision.models.alexnet(weights=None).eval()
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(CHANNELS)}
    torch.save(alexnet.state_dict(), tmp_path / "alexnet.pth")
    torch.save(heads, tmp_path / "alex.pth")
    first, second = (torch.from_numpy(clip_of(random, side=64)) for _ in range(2))
    found = load_lpips(tmp_path / "alex.pth", tmp_path / "alexnet.pth")(first, second)

    def taps(pictures):
        x = pictures.permute(0, 3, 1, 2).float() / 255 * 2 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        rows = []
        for number, layer in enumerate(alexnet.features):
            x = layer(x)
            if number in (1, 4, 7, 9, 11):
                rows.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return rows

    expected = sum(
        F.conv2d((a - b) ** 2, heads[f"lin{i}.model.1.weight"]).mean(dim=(1, 2, 3))
        for i, (a, b) in enumerate(zip(taps(first), taps(second), strict=True))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_probe_recovers_a_linear_relation_on_frames_it_has_not_seen(random):
    pixels = random.integers(0, 256, (30, 4, 6, 6, 3), dtype=np.uint8)
    mixing = random.normal(size=(108, 3)) / 10
    hands = [clip.reshape(4, -1) / 255 @ mixing + [0.1, 0.6, 0.2] for clip in pixels]
    config = ProbeConfig(penalties=(1e-9, 1e-2, 1.0))
    probe = fit_probe(list(pixels[:29]), hands[:29], config)
    assert probe.error_m(pixels[29], hands[29]) < 1e-3
    shifted = hands[29] + [0.0, 0.03, 0.04]
    assert probe.error_m(pixels[29], shifted) == pytest.approx(0.05, abs=2e-3)


def test_the_probe_chooses_the_penalty_that_predicts(random):
    """Positions that the pixels do not tell are best guessed by their mean: the largest penalty."""
    pixels = list(random.integers(0, 256, (20, 3, 8, 8, 3), dtype=np.uint8))
    hands = [random.normal(size=(3, 3)) for _ in pixels]
    probe = fit_probe(pixels, hands, ProbeConfig(penalties=(1e-6, 1e6)))
    assert np.abs(probe.weights).max() < 1e-5
    with pytest.raises(InputError, match="a position probe of 1 clips"):
        fit_probe(pixels[:1], hands[:1], ProbeConfig())


def test_pictures_are_resized_as_for_training(random):
    frames = clip_of(random, frames=2, side=30)[:, :20]
    pictures = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    expected = F.interpolate(pictures, (16, 16), mode="bilinear", align_corners=False, antialias=False)
    assert np.abs(resize(frames, 16).transpose(0, 3, 1, 2) - expected.numpy()).max() <= 0.5
    assert resize(frames[:, :, :20], 20) is not None
