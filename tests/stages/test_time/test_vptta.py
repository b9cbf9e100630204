"""VPTTA by hand: prompts, the memory bank, the loss, and a step."""

from __future__ import annotations

import math

import pytest
import torch

from stages.test_time.low_frequency import (
    MemoryBank,
    factors,
    spectrum_of,
    window_of,
    window_side,
    with_prompt,
)
from stages.test_time.vptta import Vptta, prompt_loss
from stages.train.source_statistics import Moments


def images(count: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.manual_seed(0))


@pytest.mark.parametrize("size", [32, 33, 224])
def test_a_prompt_of_ones_returns_the_image(size: int) -> None:
    original = images(size=size)
    side = window_side(size)
    found = with_prompt(spectrum_of(original), torch.ones(3, side, side))
    torch.testing.assert_close(found, original, atol=1e-6, rtol=1e-6)


def test_the_window_is_odd_and_symmetric_about_frequency_zero() -> None:
    assert [window_side(size) for size in (64, 224, 384, 512, 518, 1024)] == [1, 3, 3, 5, 5, 11]
    for size in (32, 33, 224):
        field = factors(torch.full((3, 3, 3), 2.0), size)
        assert float(field.sum()) == 3 * (size * size + 9)
        # Position c + k and c - k hold the frequencies k and -k.
        row, column = (field[0] == 2).nonzero().T
        centre = size // 2
        assert sorted((row - centre).unique().tolist()) == [-1, 0, 1] == sorted((column - centre).unique().tolist())
        # A real image stays real: nothing is lost when the imaginary part is dropped.
        spectrum = spectrum_of(images(1, size)) * field
        back = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1)))
        assert float(back.imag.abs().max()) < 1e-5
    constant = torch.full((1, 3, 32, 32), 0.5)
    assert float(with_prompt(spectrum_of(constant), torch.full((3, 1, 1), 3.0)).mean()) == pytest.approx(1.5)
    key = window_of(spectrum_of(constant), 1)
    assert key.shape == (1, 3, 1, 1) and float(key[0, 0]) == pytest.approx(512.0)


def test_images_of_a_batch_do_not_mix() -> None:
    two = images(2)
    both, each = window_of(spectrum_of(two), 3), [window_of(spectrum_of(one[None]), 3) for one in two]
    torch.testing.assert_close(both, torch.cat(each))


def test_the_bank_keeps_forty_and_averages_the_nearest() -> None:
    bank, generator = MemoryBank(), torch.manual_seed(1)
    key = torch.rand(3, 3, 3, generator=generator)
    for _ in range(15):
        bank.add(torch.rand(3, 3, 3, generator=generator), torch.full((3, 3, 3), 2.0))
    assert torch.equal(bank.initial(key), torch.ones(3, 3, 3)), "fewer than 16 entries"
    bank.add(torch.rand(3, 3, 3, generator=generator), torch.full((3, 3, 3), 2.0))
    torch.testing.assert_close(bank.initial(key), torch.full((3, 3, 3), 2.0))
    for _ in range(100):
        bank.add(torch.rand(3, 3, 3, generator=generator), torch.full((3, 3, 3), 4.0))
    assert len(bank) == 40
    torch.testing.assert_close(bank.initial(key), torch.full((3, 3, 3), 4.0))
    # By hand: sixteen nearest by cosine, softmax at 0.2.
    keys, prompts = torch.rand(20, 27, generator=generator), torch.rand(20, 27, generator=generator)
    bank = MemoryBank()
    for one, prompt in zip(keys, prompts, strict=True):
        bank.add(one.view(3, 3, 3), prompt.view(3, 3, 3))
    cosine = keys @ key.flatten() / (keys.norm(dim=1) * key.norm())
    nearest = sorted(range(20), key=lambda at: -float(cosine[at]))[:16]
    weight = torch.tensor([math.exp(float(cosine[at]) / 0.2) for at in nearest])
    expected = (weight[:, None] * prompts[nearest]).sum(0) / weight.sum()
    torch.testing.assert_close(bank.initial(key).flatten(), expected)


def test_the_loss_by_hand() -> None:
    mean, variance = torch.tensor([[1.0, 3.0], [0.0, 2.0]]), torch.tensor([[4.0, 9.0], [1.0, 16.0]])
    source = Moments(torch.zeros(2, 2), torch.ones(2, 2), 32)
    m = 1 / (math.sqrt(4) / 5 + 1)
    expected = 0.0
    for mu_x, v_x in zip(mean.tolist(), variance.tolist(), strict=True):
        expected += sum(abs(m * one - one) for one in mu_x) / 2
        expected += sum(abs(math.sqrt(m * one + (1 - m)) - math.sqrt(one)) for one in v_x) / 2
    assert float(prompt_loss(mean, variance, source, seen=4)) == pytest.approx(expected / 2, rel=1e-6)


class Channels:
    """Observes the mean and variance of each channel of the images; predicts from the means."""

    def __init__(self) -> None:
        self.norm_calls = self.predictions = 0

    def norms(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.norm_calls += 1
        variance, mean = torch.var_mean(pixels, dim=(0, 2, 3), correction=0)
        return mean[None], variance[None]

    def predict(self, pixels: torch.Tensor) -> torch.Tensor:
        self.predictions += 1
        return pixels.mean(dim=(2, 3))


def test_nothing_changes_where_the_statistics_are_those_of_the_source() -> None:
    target, original = Channels(), images(1)
    spectrum = spectrum_of(original)
    ones = torch.ones(3, 1, 1)
    source = Moments(*(one.detach() for one in target.norms(with_prompt(spectrum, ones))), 1)
    adapted = Vptta(target, source)
    adapted._seen = 1
    assert torch.equal(adapted.adapted(spectrum, ones), ones)
    shifted = spectrum_of(original + 0.5)
    moved = adapted.adapted(shifted, ones)
    assert ((moved - 1).abs() - 0.05).abs().max() < 1e-4, "a fresh Adam makes a step of its rate"


def test_a_shifted_stream_is_brought_back_image_by_image() -> None:
    target = Channels()
    bright = images(20) + 2.0
    source = Moments(torch.full((1, 3), 1.0), torch.ones(1, 3), 32)
    stream = Vptta(target, source)
    found = stream.step(bright)
    assert (target.norm_calls, target.predictions) == (20, 20)
    plain = bright.mean(dim=(2, 3))
    assert ((found - 1).abs() < (plain - 1).abs()).all()
    # With sixteen prompts in the bank, the step starts from them and goes further.
    assert (found[16:] / plain[16:]).max() < 0.93 < (found[:16] / plain[:16]).min()
    torch.testing.assert_close(Vptta(Channels(), source).step(bright), found)
    other = Vptta(Channels(), source).step(bright.flip(0)).flip(0)
    assert not torch.allclose(other, found), "predictions depend on the order"
