from __future__ import annotations

import copy
import itertools
import math
import pickle
import random
import threading
import time

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_privacy.errors import ConfigurationError, GuaranteeError
from lightning_privacy.noise import (
    GaussianNoise,
    NoiseMechanism,
    fresh_secret,
    gaussian,
    secret_from_seed,
)

# A correct generator fails a statistical test below once in a million; and the seeds are fixed.
ALPHA = 1e-6


def noise(seed: int = 0, **options) -> GaussianNoise:
    return GaussianNoise(secret_from_seed(seed), **options)


def values(size: int, name: str = "w", release: int = 0, std: float = 1.0, seed: int = 0):
    return noise(seed).sample(name, torch.empty(size), release, std).double().numpy()


def assert_variance(sample: np.ndarray, std: float) -> None:
    total = float((sample**2).sum()) / std**2
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], len(sample))
    assert low < total < high


def assert_uncorrelated(left: np.ndarray, right: np.ndarray) -> None:
    correlation = np.corrcoef(left, right)[0, 1] * math.sqrt(len(left))
    assert abs(correlation) < stats.norm.isf(ALPHA / 2)


@pytest.mark.parametrize("size", [20_000, 100_000])
@pytest.mark.parametrize("std", [1.0, 0.3, 250.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_realised_noise_has_the_promised_size(size, std, seed):
    sample = values(size, std=std, seed=seed)
    assert_variance(sample, std)
    assert abs(sample.mean()) * math.sqrt(size) / std < stats.norm.isf(ALPHA / 2)
    assert stats.kstest(sample / std, "norm").pvalue > ALPHA


@pytest.mark.parametrize("wrong", [0.97, 1.03])
def test_the_size_test_notices_three_per_cent(wrong):
    with pytest.raises(AssertionError):
        assert_variance(values(20_000, std=wrong), 1.0)


def test_the_pieces_of_a_large_tensor_are_independent():
    size = gaussian._CHUNK
    sample = values(3 * size + 17)
    assert_variance(sample, 1.0)
    chunks = [sample[start : start + size] for start in range(0, 3 * size, size)]
    for left, right in itertools.combinations(chunks, 2):
        assert_uncorrelated(left, right)
    assert_uncorrelated(sample[:-1], sample[1:])


def test_releases_parameters_and_secrets_are_independent():
    draws = [
        values(50_000),
        values(50_000, release=1),
        values(50_000, release=2**32),
        values(50_000, name="v"),
        values(50_000, name="w0"),
        values(50_000, seed=1),
    ]
    for left, right in itertools.combinations(draws, 2):
        assert_uncorrelated(left, right)
        assert (left != right).mean() > 0.99


def test_a_name_and_a_number_cannot_be_confused():
    # Without a length before each part, ("1", 1) and ("", 11) could share a key.
    mechanism = noise()
    keys = {
        mechanism._key(name, release, part)
        for name in ("", "1", "11", "\x01", "\x00")
        for release in (0, 1, 11, 256, 257)
        for part in (0, 1, 11, 256, 257)
    }
    assert len(keys) == 125
    assert max(keys).bit_length() > 120


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 33, 63, 64, 65, 127, 200])
def test_every_bit_of_a_key_counts(bit):
    # torch's CPU generator keeps 32 bits of its seed, numpy's default takes any.
    assert not np.array_equal(values(100, seed=7), values(100, seed=7 + 2**bit))
    assert not np.array_equal(values(100, release=7), values(100, release=7 + 2**bit))
    if bit < 128:
        for dtype in (torch.float32, torch.float64):
            out, other = torch.empty(100, dtype=dtype), torch.empty(100, dtype=dtype)
            gaussian._fill_chunk(out, 7, 1.0, add=False)
            gaussian._fill_chunk(other, 7 ^ (1 << bit), 1.0, add=False)
            assert not torch.equal(out, other)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 1001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chunk_of_any_size_is_filled_with_different_values(size, dtype):
    out = torch.full((size,), torch.nan, dtype=dtype)
    gaussian._fill_chunk(out, 7, 1.0, add=False)
    assert bool(out.isfinite().all())
    assert len(set(out.tolist())) == size


class Bits:
    """A stream that always gives the same 64 bits."""

    def __init__(self, bits):
        self.bits = bits

    def random_raw(self, size):
        return np.full(size, self.bits, dtype=np.uint64)


@pytest.mark.parametrize("bits", [0, 1, 2**10, 2**24 + 1, 2**40 + 3, 2**62, 2**63 - 1])
def test_the_radius_follows_every_uniform_number(bits):
    # A float32 generator never exceeds 5.76: its smallest uniform number is 2**-24.
    radius = float(gaussian._box_muller(Bits(bits), 2, 1.0).double().norm())
    uniform = min(1.0, (bits + 0.5) / 2**63)
    # Near 1 a float32 uniform number has 24 bits.
    error = 1e-6 if uniform < 0.9 else 5e-4
    assert radius == pytest.approx(math.sqrt(-2 * math.log(uniform)), abs=error)


def test_the_tail_reaches_beyond_nine_standard_deviations():
    assert 9.3 < float(gaussian._box_muller(Bits(0), 2, 1.0).norm()) < 9.5


def test_large_values_are_as_frequent_as_they_should_be():
    found = np.abs(values(8_000_000))
    for bound, share in ((3.0, 2.6998e-3), (4.0, 6.3342e-5), (4.8, 1.5867e-6)):
        expected = share * len(found)
        assert abs(int((found > bound).sum()) - expected) < 5 * expected**0.5 + 5


def test_seeds_of_either_sign_differ():
    seeds = [0, 1, -1, 127, 128, -128, 255, 256, -256, 2**64, -(2**64)]
    assert len({secret_from_seed(seed) for seed in seeds}) == len(seeds)


def test_secrets_are_fresh_and_long():
    secrets = {fresh_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert {len(secret) for secret in secrets} == {32}


def test_float64_has_values_of_its_own_precision():
    sample = noise().sample("w", torch.empty(1000, dtype=torch.float64), 0, 1.0)
    assert sample.dtype == torch.float64
    assert (sample.float().double() != sample).all()


def test_nothing_outside_influences_the_noise_and_nothing_is_influenced():
    def states():
        return (
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            random.getstate(),
        )

    before = states()
    first = values(1000)
    assert states() == before
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        torch.rand(3)
        assert np.array_equal(values(1000), first)


def test_two_runs_with_the_same_seed_of_the_program_have_other_noise():
    with torch.random.fork_rng(devices=[]):
        draws = []
        for _ in range(2):
            torch.manual_seed(0)
            draws.append(GaussianNoise(fresh_secret()).sample("w", torch.empty(100), 0, 1.0))
    assert not torch.equal(*draws)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_the_number_of_threads_does_not_change_the_values(threads):
    size = 3 * gaussian._CHUNK + 5
    alone = noise(threads=1).sample("w", torch.empty(size), 4, 2.0)
    together = noise(threads=threads).sample("w", torch.empty(size), 4, 2.0)
    assert torch.equal(alone, together)


def test_a_larger_tensor_begins_like_a_smaller_one():
    size = gaussian._CHUNK
    assert np.array_equal(values(size + 5)[:size], values(size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [7, 2 * gaussian._CHUNK + 3])
def test_adding_in_place_adds_the_same_values(size, dtype):
    start = torch.linspace(-1, 1, size, dtype=dtype)
    tensor = start.clone()
    assert noise().add_(tensor, "w", 0, 0.5) is tensor
    assert torch.equal(tensor, start + noise().sample("w", tensor, 0, 0.5))


def test_adding_works_on_parameters_and_on_views():
    parameter = torch.nn.Parameter(torch.zeros(4, 6))
    noise().add_(parameter, "w", 0, 1.0)
    expected = noise().sample("w", torch.empty(4, 6), 0, 1.0)
    assert torch.equal(parameter.detach(), expected)
    table = torch.zeros(6, 4)
    noise().add_(table.t(), "w", 0, 1.0)
    assert torch.equal(table.t(), expected)


def test_shapes_are_kept():
    for shape in [(), (0,), (3,), (2, 3, 4)]:
        sample = noise().sample("w", torch.empty(shape, dtype=torch.bfloat16), 0, 1.0)
        assert sample.shape == shape
        assert sample.dtype == torch.float32
        assert sample.is_contiguous()


def test_no_noise_is_exactly_zero():
    assert not values(100, std=0.0).any()


def test_a_release_is_drawn_once_for_each_parameter():
    mechanism, like = noise(), torch.empty(3)
    mechanism.sample("w", like, 5, 1.0)
    mechanism.sample("v", like, 5, 1.0)
    for release in (5, 4, 0):
        with pytest.raises(GuaranteeError, match="once, in rising order"):
            mechanism.sample("w", like, release, 1.0)
        with pytest.raises(GuaranteeError, match="difference has none"):
            mechanism.add_(torch.zeros(3), "w", release, 1.0)
    mechanism.sample("w", like, 6, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_noise_is_not_added_in_low_precision(dtype):
    with pytest.raises(ConfigurationError, match="must be added in float32 or float64"):
        noise().add_(torch.zeros(3, dtype=dtype), "w", 0, 1.0)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, True, "1", None])
def test_the_standard_deviation_must_be_a_number(bad):
    with pytest.raises(ConfigurationError, match="`std` must be a finite number"):
        noise().sample("w", torch.empty(3), 0, bad)


@pytest.mark.parametrize("bad", [-1, 1.0, True, None])
def test_the_release_must_be_a_whole_number(bad):
    with pytest.raises(ConfigurationError, match="`release` must be a whole number >= 0"):
        noise().sample("w", torch.empty(3), bad, 1.0)


@pytest.mark.parametrize("bad", [b"", b"short", b"x" * 65, "x" * 32, None, 7])
def test_the_secret_must_be_long_enough_to_be_one(bad):
    with pytest.raises(ConfigurationError, match="`secret` must be 16 to 64 bytes") as caught:
        GaussianNoise(bad)
    assert "short" not in str(caught.value)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_the_number_of_threads_must_be_positive(bad):
    with pytest.raises(ConfigurationError, match="`threads` must be a whole number >= 1"):
        noise(threads=bad)


@pytest.mark.parametrize("bad", [1.5, "1", None, True])
def test_a_seed_must_be_a_whole_number(bad):
    with pytest.raises(ConfigurationError, match="`seed` must be a whole number"):
        secret_from_seed(bad)


def test_the_secret_stays_in_the_process():
    secret = fresh_secret()
    mechanism = GaussianNoise(secret)
    for escape in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(GuaranteeError, match="must stay in the process"):
            escape(mechanism)
    assert secret.hex() not in repr(mechanism)
    assert str(secret) not in repr(mechanism)


def test_no_thread_is_left_when_nobody_needs_the_noise():
    before = set(threading.enumerate())
    mechanism = noise(threads=2)
    mechanism.sample("w", torch.empty(2 * gaussian._CHUNK), 0, 1.0)
    started = set(threading.enumerate()) - before
    assert started
    del mechanism
    deadline = time.monotonic() + 60
    while any(thread.is_alive() for thread in started) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in started)


def test_it_is_a_noise_mechanism():
    assert isinstance(noise(), NoiseMechanism)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_cuda_the_noise_has_the_promised_size_and_no_repetition(dtype):
    like = torch.empty(200_000, device="cuda", dtype=dtype)
    state = torch.cuda.get_rng_state()
    first, second = (noise().sample(name, like, 0, 0.5) for name in ("w", "v"))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert first.device == like.device
    assert first.dtype == dtype
    again = noise().sample("w", like, 0, 0.5)
    assert torch.equal(first, again)
    left, right = first.double().cpu().numpy(), second.double().cpu().numpy()
    assert_variance(left, 0.5)
    assert stats.kstest(left / 0.5, "norm").pvalue > ALPHA
    assert_uncorrelated(left, right)
    added = torch.zeros_like(like)
    noise().add_(added, "w", 0, 0.5)
    assert torch.equal(added, first)


@pytest.mark.gpu
def test_on_cuda_the_tail_goes_beyond_one_float32_draw():
    like = torch.empty(100_000_000, device="cuda")
    largest = max(float(noise().sample(f"w{i}", like, 0, 1.0).abs().max()) for i in range(12))
    assert largest > 5.8
