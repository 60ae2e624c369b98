"""Losses of the x0 estimate, against formulas in NumPy and the libraries that define them."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from accuracy import to_numpy
from oracle import assert_close
from torch import nn

import fastdiff
from fastdiff import losses
from fastdiff.losses.features import Alignment, Classification, Fourier, Perceptual, Wavelet, frozen

BATCH, CHANNELS, SIZE = 3, 3, 8


def images(*shape, dtype=torch.float64):
    return [torch.randn(*(shape or (BATCH, CHANNELS, SIZE, SIZE)), dtype=dtype) for _ in range(2)]


def network(*widths, dtype=torch.float64):
    """Convolutions with ReLUs between them: an nn.Sequential."""
    widths = (CHANNELS, *(widths or (5, 6)))
    layers = [part for a, b in zip(widths, widths[1:]) for part in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers).to(dtype)


def features_of(extractor, x, layers):
    found = []
    for module in extractor:
        x = module(x)
        found.append(to_numpy(x))
    return [found[layer] for layer in layers]


# ----------------------------------------------------------------------------------------------------------- perceptual


@pytest.mark.parametrize("weights", ["none", "numbers", "channels"])
@pytest.mark.parametrize("distance", ["lpips", "mse", "l1"])
def test_perceptual_is_its_formula(distance, weights):
    extractor, (a, b) = network(), images()
    of_a, of_b = (features_of(extractor, x, [1, 3]) for x in (a, b))
    given = {"none": None, "numbers": [0.5, 2.0], "channels": [torch.rand(5).double(), torch.rand(6).double()]}[weights]
    numbers = [np.ones(5), np.ones(6)]
    if given is not None:
        numbers = [np.ones(c) * to_numpy(torch.as_tensor(w)) for c, w in zip((5, 6), given)]
    if distance == "lpips":
        expected = oracle.lpips(of_a, of_b, numbers)
    else:
        error = {"mse": np.square, "l1": np.abs}[distance]
        expected = sum(
            (w[:, None, None] * error(x - y)).mean((1, 2, 3)) for x, y, w in zip(of_a, of_b, numbers, strict=True)
        )
    found = Perceptual(extractor, layers=[1, 3], weights=given, distance=distance)(a, b)
    assert found.dtype == torch.float64 and found.shape == (BATCH,)
    assert_close(to_numpy(found), expected, rel=1e-13)


@pytest.mark.parametrize("kind", ["tensor", "list", "named", "dict", "chosen", "chosen by name"])
def test_what_an_extractor_may_return(kind):
    (a, b), extractor = images(), network()

    def returned(x):
        first, second = extractor[:2](x), extractor(x)
        return {
            "tensor": second,
            "list": [first, second],
            "named": (first, second),
            "dict": {"first": first, "second": second},
            "chosen": [second, first, second],
            "chosen by name": {"second": second, "first": first},
        }[kind]

    layers = {"tensor": [3], "chosen": [1], "chosen by name": [1]}.get(kind, [1, 3])
    chosen = {"chosen": [1], "chosen by name": ["first"]}.get(kind)
    expected = oracle.lpips(*(features_of(extractor, x, layers) for x in (a, b)))
    assert_close(to_numpy(Perceptual(returned, layers=chosen)(a, b)), expected, rel=1e-13)


def test_the_last_module_of_a_sequential_is_its_output():
    (a, b), extractor = images(), network()
    assert torch.equal(Perceptual(extractor)(a, b), Perceptual(extractor, layers=[3])(a, b))


@pytest.mark.parametrize("layers", [[0], [1], [0, 1], [0, 2], [4, 3, 0, 1, 2]], ids=str)
def test_modules_that_work_in_place_do_not_change_the_features_before_them(layers):
    """As in torchvision's VGG, whose ReLUs are in-place: right behind a layer, in a block, behind a module that returns
    what it is given, or in a function."""

    class Clipped(nn.Module):
        def forward(self, x):
            return x.clamp_(max=0.3)

    def made(inplace):
        torch.manual_seed(5)
        relu = nn.ReLU(inplace)
        block = nn.Sequential(nn.LeakyReLU(0.1, inplace), nn.Conv2d(4, 4, 1))
        clipped = Clipped() if inplace else nn.Hardtanh(-1e9, 0.3)
        return nn.Sequential(nn.Conv2d(CHANNELS, 4, 1), nn.Identity(), relu, block, clipped).double()

    (a, b), plain = images(), made(False)
    a.requires_grad_()
    expected = oracle.lpips(*(features_of(plain, x, layers) for x in (a, b)))
    of_plain = Perceptual(plain, layers=layers)(a, b)
    found = Perceptual(made(True), layers=layers)(a, b)
    assert_close(to_numpy(found), expected, rel=1e-13)
    slopes = [torch.autograd.grad(loss.sum(), a)[0] for loss in (of_plain, found)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-14)


def test_no_module_behind_the_last_layer_is_run():
    calls = []
    extractor = network()
    for number, module in enumerate(extractor):
        module.register_forward_hook(lambda *_, number=number: calls.append(number))
    Perceptual(extractor, layers=[1, 0])(*images())
    assert calls == [0, 1, 0, 1]


def test_tokens_have_their_channels_last():
    a, b = images(2, 4, 7)
    layer = nn.Linear(7, 5).double()
    found = Perceptual(layer, channel_dim=-1)(a, b)
    of_a, of_b = (to_numpy(layer(x)).transpose(0, 2, 1) for x in (a, b))
    assert_close(to_numpy(found), oracle.lpips([of_a], [of_b]), rel=1e-13)


def test_an_embedding_has_no_places():
    a, b = images(2, 7)
    assert_close(to_numpy(Perceptual(lambda x: x)(a, b)), oracle.lpips([to_numpy(a)], [to_numpy(b)]), rel=1e-13)


def test_where_all_features_are_zero_the_gradient_is_finite():
    """A ReLU that lets nothing pass: the norm is not differentiable there, and the lpips package's gradient is NaN."""
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    truth = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def extractor(images):
        alive = torch.ones(4, 4, dtype=torch.float64)
        alive[0] = 0
        return images.relu() * alive

    found = Perceptual(extractor)(x, truth)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert_close(to_numpy(found), oracle.lpips(*([to_numpy(extractor(y))] for y in (x, truth))), rel=1e-13)
    assert bool(gradient.isfinite().all()) and not gradient[:, :, 0].any() and gradient.any()


def test_perceptual_of_bfloat16_features_is_computed_in_float32():
    a, b = images()
    half = Perceptual(lambda x: x.bfloat16())(a, b)
    wide = Perceptual(lambda x: x.bfloat16().float())(a, b)
    assert half.dtype == torch.float32 and torch.equal(half, wide)


@pytest.fixture
def lpips(monkeypatch):
    """The package, with small random networks in place of torchvision's."""
    models = ModuleType("torchvision.models")

    def alexnet(pretrained=False, **_):
        parts = []
        for number, (a, b) in enumerate(zip((3, 64, 192, 384, 256), (64, 192, 384, 256, 256))):
            parts += [nn.MaxPool2d(2)] * (number in (1, 2)) + [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
        return SimpleNamespace(features=nn.Sequential(*parts))

    models.alexnet = alexnet
    package = ModuleType("torchvision")
    package.models = models
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lpips"]:
        monkeypatch.delitem(sys.modules, name)
    found = pytest.importorskip("lpips")
    yield found
    for name in [name for name in sys.modules if name.partition(".")[0] == "lpips"]:
        del sys.modules[name]


@pytest.mark.parametrize("version", ["0.1", "0.0"])
def test_perceptual_is_what_the_lpips_package_computes(lpips, version):
    """With its learned weights; value and gradient, to rounding."""
    model = lpips.LPIPS(net="alex", version=version, verbose=False).double()
    a, b = (torch.tanh(x) for x in images(2, 3, 16, 16))
    a.requires_grad_()
    expected = model(a, b).flatten()
    loss = Perceptual.from_lpips(model)
    found = loss(a, b)
    assert_close(to_numpy(found), to_numpy(expected), rel=1e-12)
    (ours,), (theirs,) = (torch.autograd.grad(x.sum(), a) for x in (found, expected))
    assert_close(to_numpy(ours), to_numpy(theirs), rel=1e-9, absolute=1e-12 * float(theirs.abs().max()))
    # The formula from the papers, with the same layers.
    with torch.no_grad():
        of_a, of_b = ([to_numpy(y) for y in loss.extractor(x)] for x in (a, b))
    weights = [to_numpy(lin.model[-1].weight).ravel() for lin in model.lins]
    assert_close(to_numpy(found), oracle.lpips(of_a, of_b, weights), rel=1e-12)
    assert all(lin.model[-1].weight.grad is None for lin in model.lins)


def test_perceptual_without_learned_weights_is_the_baseline_of_the_package(lpips):
    model = lpips.LPIPS(net="alex", lpips=False, verbose=False).double()
    a, b = (torch.tanh(x) for x in images(2, 3, 16, 16))
    found = Perceptual(nn.Sequential(model.scaling_layer, model.net))(a, b)
    assert_close(to_numpy(found), to_numpy(model(a, b)).ravel(), rel=1e-12)
    with pytest.raises(TypeError, match="lpips.LPIPS with lpips=True; got 'LPIPS'"):
        Perceptual.from_lpips(model)


# ------------------------------------------------------------------------------------------ what does not get gradients


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 3).double(), nn.BatchNorm1d(3).double()

    def forward(self, x):
        return self.norm(self.layer(x))

    def encode(self, x):
        return 2 * self(x)


@pytest.mark.parametrize("kind", ["module", "method"])
def test_the_parameters_of_a_network_get_no_gradient_and_stay_trainable(kind):
    encoder = Encoder()
    function = encoder if kind == "module" else encoder.encode
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    expected = function(x)
    (by_x,) = torch.autograd.grad(expected.square().sum(), x)
    found = frozen(function, x)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    assert torch.equal(x.grad, by_x)
    assert all(part.requires_grad and part.grad is None for part in encoder.parameters())


def test_a_network_without_learned_parameters_is_called_itself(monkeypatch):
    encoder = Encoder().requires_grad_(False)
    monkeypatch.setattr(torch.func, "functional_call", None)
    x = torch.randn(5, 4, dtype=torch.float64)
    assert torch.equal(frozen(encoder, x), encoder(x))
    assert torch.equal(frozen(torch.sin, x), x.sin())


# -------------------------------------------------------------------------------------------- alignment, classification


def test_alignment_is_a_cosine():
    image, text = nn.Linear(12, 5).double(), nn.Embedding(7, 5).double()
    (x, _), y = images(4, 12), torch.tensor([0, 6, 2, 2])
    found = Alignment(image, text)(x, y)
    a, b = to_numpy(image(x)), to_numpy(text(y))
    cosine = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    assert_close(to_numpy(found), 1 - cosine, rel=1e-13, absolute=1e-15)
    torch.testing.assert_close(found, 1 - torch.cosine_similarity(image(x), text(y)), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(Alignment(image)(x, text(y)), found, rtol=0, atol=0)


def test_alignment_is_one_sample_beside_another():
    e = torch.eye(3, dtype=torch.float64)
    found = Alignment(lambda x: x)(e, torch.stack([e[0], -e[1], e[0]]))
    assert found.tolist() == [0, 2, 1]


@pytest.mark.parametrize("labels", ["numbers", "probabilities"])
def test_classification_is_a_cross_entropy(labels):
    classifier, (x, _) = nn.Linear(12, 5).double(), images(4, 12)
    y = torch.tensor([0, 4, 2, 2]) if labels == "numbers" else torch.rand(4, 5).double().softmax(1)
    p = np.eye(5)[y] if labels == "numbers" else to_numpy(y)
    logits = to_numpy(classifier(x)).astype(np.longdouble)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found = Classification(classifier)(x, y)
    assert_close(to_numpy(found), -(p * logs).sum(1), rel=1e-13)
    assert torch.equal(Classification(classifier)(x, y, torch.zeros(4)), found)


def test_a_classifier_may_be_told_the_time():
    (x, _), t = images(4, 5), torch.tensor([0.0, 1.0, 2.0, 3.0]).double()
    found = Classification(lambda x, t: x * t[:, None], with_time=True)(x, torch.zeros(4, dtype=torch.int64), t)
    torch.testing.assert_close(found, F.cross_entropy(x * t[:, None], torch.zeros(4).long(), reduction="none"))
    assert found[0].item() == pytest.approx(np.log(5))


# ---------------------------------------------------------------------------------------------------- Fourier, wavelets


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_the_focal_frequency_loss_is_its_formula(alpha):
    a, b = images(3, 2, 6, 10)
    expected = oracle.focal_frequency(to_numpy(a), to_numpy(b), alpha)
    assert_close(to_numpy(Fourier(alpha=alpha)(a, b)), expected, rel=1e-12)
    if alpha == 0:  # Parseval
        assert_close(expected, to_numpy((a - b).square().mean((1, 2, 3))), rel=1e-12)
    if alpha == 1:
        assert torch.equal(Fourier()(a, b), Fourier("focal", 1.0)(a, b))


def test_the_focal_weights_have_no_gradient():
    """With the weights held, the gradient of mean w abs(F)^2 is 2 / n times the inverse transform of w F."""
    a, b = images(1, 1, 4, 4)
    a.requires_grad_()
    Fourier()(a, b).sum().backward()
    f = np.fft.fft2(to_numpy(a - b), norm="ortho")
    weight = np.abs(f) / np.abs(f).max()
    assert_close(to_numpy(a.grad), 2 / 16 * np.fft.ifft2(weight * f, norm="ortho").real, rel=1e-11, absolute=1e-14)


@pytest.mark.parametrize("form", ["focal", "amplitude"])
def test_equal_images_have_equal_spectra(form):
    a, _ = images(2, 1, 4, 4)
    x = a.clone().requires_grad_()
    found = Fourier(form)(x, a)
    found.sum().backward()
    assert found.tolist() == [0, 0] and not x.grad.any()


def test_amplitudes_are_their_formula():
    a, b = images(3, 2, 6, 10)
    found = Fourier("amplitude")(a, b)
    assert_close(to_numpy(found), oracle.amplitude_difference(to_numpy(a), to_numpy(b)), rel=1e-12)
    shifted = Fourier("amplitude")(a, a.roll((1, 3), (-2, -1)))
    assert float(shifted.max()) < 1e-13 and float(Fourier()(a, a.roll((1, 3), (-2, -1))).min()) > 0.1


@pytest.mark.parametrize("levels", [1, 2])
def test_haar_sub_bands_are_sums_and_differences(levels):
    a, b = images(3, 2, 8, 12)
    bands = oracle.haar_bands(to_numpy(a - b), levels)
    assert len(bands) == 3 * levels + 1
    expected = sum(np.abs(band).mean((1, 2, 3)) for band in bands)
    assert_close(to_numpy(Wavelet(levels=levels)(a, b)), expected, rel=1e-13)
    if levels == 1:
        half = 0.5**0.5
        given = Wavelet(([half, half], [half, -half]))
        assert torch.equal(given(a, b), Wavelet()(a, b))


def test_a_filter_bank_of_ones_own():
    """Daubechies' four numbers, as matrices."""
    r = np.sqrt(3)
    low = np.array([1 + r, 3 + r, 3 - r, 1 - r]) / (4 * np.sqrt(2))
    high = low[::-1] * np.array([1, -1, 1, -1])
    a, b = images(2, 1, 6, 8)

    def matrix(f, size):
        made = np.zeros((size // 2, size))
        for n in range(size // 2):
            for k in range(4):
                made[n, (2 * n + k) % size] += f[k]
        return made

    x, expected = to_numpy(a - b), 0
    for rows in (low, high):
        for columns in (low, high):
            expected = expected + np.abs(matrix(rows, 6) @ x @ matrix(columns, 8).T).mean((1, 2, 3))
    assert_close(to_numpy(Wavelet((low.tolist(), high.tolist()))(a, b)), expected, rel=1e-13)


# ------------------------------------------------------------------------------------------ gradients, modes of PyTorch

SMOOTH = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Softplus()).double()
FLAT = nn.Sequential(nn.Flatten(), nn.Linear(32, 4)).double()
LABELS = torch.tensor([1, 3])
LOSSES = {
    "lpips": (Perceptual(SMOOTH), ()),
    "features": (Perceptual(SMOOTH, distance="mse"), ()),
    "alignment": (Alignment(FLAT), (torch.randn(2, 4, dtype=torch.float64),)),
    "classification": (Classification(FLAT), (LABELS,)),
    "focal": (Fourier(alpha=0.0), ()),
    "amplitude": (Fourier("amplitude"), ()),
    "wavelet": (Wavelet(levels=2), ()),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_gradients_reach_the_prediction_through_the_estimate(name):
    loss, given = LOSSES[name]
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction")
    x0, prediction = images(2, 2, 4, 4)
    noised = objective.noise(x0, torch.tensor([200, 700]), seed=1)

    def of(prediction):
        return loss(objective.predict_x0(prediction, noised), *(given or (x0,)))

    assert torch.autograd.gradcheck(of, prediction.requires_grad_())


@pytest.mark.parametrize("name", list(LOSSES))
def test_compiled_it_has_the_same_numbers(name):
    loss, given = LOSSES[name]
    (a, b), given = images(2, 2, 4, 4), given
    compiled = torch.compile(lambda x: loss(x, *(given or (b,))), fullgraph=True, backend="aot_eager")
    x, y = (a.clone().requires_grad_() for _ in range(2))
    expected, found = loss(x, *(given or (b,))), compiled(y)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    expected.sum().backward()
    found.sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", list(LOSSES))
def test_under_autocast_the_loss_itself_is_float32(name):
    """Of the extractor's bfloat16 the differences are taken in float32."""
    loss, given = LOSSES[name]
    a, b = images(2, 2, 4, 4, dtype=torch.float32)
    nets = SMOOTH, FLAT
    for net in nets:
        net.float()
    try:
        given = tuple(part.float() if part.is_floating_point() else part for part in given)
        plain = loss(a, *(given or (b,)))
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(a, *(given or (b,)))
    finally:
        for net in nets:
            net.double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=0.1, atol=0.05)


# ---------------------------------------------------------------------------------------------------------- wrong input

X = torch.randn(2, 3, 4, 4)
WRONG = {
    "an extractor that is none": (lambda: Perceptual(3), TypeError, "extractor must be a module or another callable"),
    "a class as extractor": (lambda: Perceptual(nn.ReLU), TypeError, "the class ReLU, not an object of it"),
    "an unknown distance": (lambda: Perceptual(nn.ReLU(), distance="l2"), ValueError, "lpips, mse, l1; got 'l2'"),
    "the batch as channels": (lambda: Perceptual(nn.ReLU(), channel_dim=0), ValueError, "other than the batch's"),
    "no such dimension": (lambda: Perceptual(nn.ReLU(), channel_dim=4)(X, X), ValueError, "no dimension 4 of channels"),
    "one layer, no list": (lambda: Perceptual(nn.ReLU(), layers=1), TypeError, "layers must be a list"),
    "no layers": (lambda: Perceptual(nn.ReLU(), layers=[]), TypeError, "layers must be a list of at least one"),
    "a layer that a Sequential lacks": (
        lambda: Perceptual(nn.Sequential(nn.ReLU()), layers=[1]), ValueError, r"numbers from 0 to 0; got \[1\]"),
    "a layer that an output lacks": (
        lambda: Perceptual(lambda x: {"a": x}, layers=["b"])(X, X), ValueError, r"lacks layers of \['b'\]: \['a'\]"),
    "the second of one tensor": (
        lambda: Perceptual(nn.ReLU(), layers=[1])(X, X), ValueError, r"lacks layers of \[1\]"),
    "weights as a tensor": (lambda: Perceptual(nn.ReLU(), weights=torch.ones(2)), TypeError, "weights must be a list"),
    "a weight as a text": (lambda: Perceptual(nn.ReLU(), weights=["1"]), TypeError, "weights must be a number"),
    "more weights than layers": (
        lambda: Perceptual(nn.ReLU(), weights=[1.0, 2.0])(X, X), ValueError, "2 weights for 1 layers"),
    "weights of other channels": (
        lambda: Perceptual(nn.ReLU(), weights=[torch.ones(4)])(X, X), ValueError, "3 channels, but 4 weights"),
    "an extractor that gives nothing": (
        lambda: Perceptual(lambda x: None)(X, X), TypeError, "must return a tensor, or a list or dict .*; got None"),
    "an empty list": (lambda: Perceptual(lambda x: [])(X, X), TypeError, r"list or dict of tensors; got \[\]"),
    "what is no tensor": (lambda: Perceptual(lambda x: [x, 1.0])(X, X), TypeError, "layer 1 of the extractor's output"),
    "whole numbers": (lambda: Perceptual(lambda x: x.long())(X, X), TypeError, "layer 0 .*floating-point.*int64"),
    "another batch": (
        lambda: Perceptual(lambda x: x[:1])(X, X), ValueError, r"batch of 2 that the extractor was given; .*\(1, 3"),
    "a number a sample": (lambda: Perceptual(lambda x: x.mean((1, 2, 3)))(X, X), ValueError, r"shape \(2,\)"),
    "images of two sizes": (lambda: Perceptual(nn.ReLU())(X, X[..., :2]), ValueError, "they must be equal"),
    "an estimate of integers": (
        lambda: Perceptual(nn.ReLU())(X.long(), X), TypeError, "estimate must be floating point"),
    "truth of integers": (lambda: Perceptual(nn.ReLU())(X, X.long()), TypeError, "truth must be floating point"),
    "truth that is no tensor": (lambda: Perceptual(nn.ReLU())(X, None), TypeError, "truth must be a tensor"),
    "no LPIPS": (lambda: Perceptual.from_lpips(nn.ReLU()), TypeError, "lpips.LPIPS with lpips=True; got 'ReLU'"),
    "an encoder that is none": (lambda: Alignment(None), TypeError, "image_encoder must be a module"),
    "a condition encoder that is none": (lambda: Alignment(nn.ReLU(), 3), TypeError, "condition_encoder must be"),
    "embeddings of two sizes": (
        lambda: Alignment(lambda x: x[:, 0, 0])(X, torch.ones(2, 5)), ValueError, r"\(2, 4\).*\(2, 5\); they must be"),
    "an image embedding with places": (
        lambda: Alignment(nn.ReLU())(X, torch.ones(2, 5)), ValueError, r"image's embedding must be \[batch, dims\]"),
    "a condition of another batch": (
        lambda: Alignment(lambda x: x[:, 0, 0])(X, torch.ones(3, 4)), ValueError, "condition's embedding must be"),
    "a condition that is no tensor": (
        lambda: Alignment(lambda x: x[:, 0, 0])(X, ["a", "b"]), TypeError, "condition's embedding must be a tensor"),
    "a classifier that is none": (lambda: Classification(2), TypeError, "classifier must be a module"),
    "logits with places": (lambda: Classification(nn.ReLU())(X, LABELS), ValueError, r"logits \[batch, classes\]"),
    "labels of another batch": (
        lambda: Classification(nn.Flatten())(X, torch.ones(3).long()), ValueError, r"int64 \[2\].*got .*int64 \[3\]"),
    "labels of float": (lambda: Classification(nn.Flatten())(X, torch.ones(2)), ValueError, "labels must be class"),
    "no labels": (lambda: Classification(nn.Flatten())(X, None), TypeError, "labels must be a tensor; got NoneType"),
    "no time": (lambda: Classification(nn.Flatten(), with_time=True)(X, LABELS), TypeError, "needs t"),
    "an unknown spectrum": (lambda: Fourier("phase"), ValueError, "focal, amplitude; got 'phase'"),
    "a negative alpha": (lambda: Fourier(alpha=-1.0), ValueError, "alpha must be at least 0"),
    "an infinite alpha": (lambda: Fourier(alpha=float("inf")), ValueError, "alpha must be .*finite"),
    "alpha as a text": (lambda: Fourier(alpha="1"), TypeError, "alpha must be a number"),
    "a spectrum of rows": (lambda: Fourier()(X[:, 0, 0], X[:, 0, 0]), ValueError, "at least 3 dimensions"),
    "an unknown wavelet": (lambda: Wavelet("db2"), ValueError, "filters must be 'haar'"),
    "three filters": (lambda: Wavelet([[1.0, 1.0]] * 3), ValueError, r"\(low, high\)"),
    "filters of two lengths": (lambda: Wavelet([[1.0, 1.0], [1.0] * 4]), ValueError, "got 2 and 4 numbers"),
    "filters of odd length": (lambda: Wavelet([[1.0] * 3] * 2), ValueError, "one even length"),
    "empty filters": (lambda: Wavelet([[], []]), ValueError, "one even length"),
    "a filter of texts": (lambda: Wavelet([["a", "b"], [1.0, 1.0]]), TypeError, "filters must be a number"),
    "no levels": (lambda: Wavelet(levels=0), ValueError, "levels must be a whole number"),
    "a size that cannot be halved": (lambda: Wavelet(levels=3)(X, X), ValueError, "multiples of 8 for 3 levels"),
    "wavelets of rows": (lambda: Wavelet()(X[:, 0, 0], X[:, 0, 0]), ValueError, "at least 3 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input(case):
    call, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        call()


def test_the_modules_are_found_by_their_names():
    assert losses.features.Perceptual is Perceptual
    with pytest.raises(AttributeError, match="no attribute 'perceptual'"):
        losses.perceptual  # noqa: B018
