"""Dropout masks as a pure function of what is masked: neither the layout of a pass nor its neighbours count.

A mask is no stretch of random numbers but a hash: each token has a key, each feature has one, and an element
is dropped where the hash of both is small. Integers alone are used, so that every device has the same masks.
"""

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: keeps neighbouring numbers apart."""
_CHUNK_ELEMENTS = {"cpu": 1 << 17}
"""What is hashed at a time: on CPU so much that all passes over it stay in the cache."""
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 25


def module_seed(seed: int, name: str) -> int:
    """56 bits that depend on the seed of a job and the name of a module, and on nothing else."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest(), "big")


def token_keys(step: int, example_N: Tensor, position_N: Tensor) -> Tensor:
    """Keys (N,) of the tokens of a step, int64.

    Args:
        step: number of the optimizer step in its run.
        example_N: number of each token's example within the step, over all workers.
        position_N: its position in the example.
    """
    begun = _mixed(torch.tensor(step, dtype=torch.int64, device=example_N.device))
    return _mixed(_mixed(begun + example_N * _signed(_GOLDEN)) + position_N * _signed(_GOLDEN))


def feature_keys(seed: int, features: int, device: torch.device) -> Tensor:
    """Keys (F,) of the inputs of a module, int32."""
    numbers_F = torch.arange(1, features + 1, dtype=torch.int64, device=device)
    return _upper_half(_mixed(numbers_F * _signed(_GOLDEN) + seed))


def dropped(seed: int, token_key_N: Tensor, feature_key_F: Tensor, rate: float) -> Tensor:
    """Which elements (N, F) of a module's input are dropped: a fraction of `rate` of them, which is below 1.

    Args:
        seed: of the module; see `module_seed`.
        token_key_N: see `token_keys`.
        feature_key_F: see `feature_keys`.
        rate: probability of an element to be dropped.
    """
    own_key_N = _upper_half(_mixed(token_key_N ^ _signed(seed * _GOLDEN)))
    below = round(rate * 2**32) - 2**31
    drop_NF = torch.empty(len(own_key_N), len(feature_key_F), dtype=torch.bool, device=own_key_N.device)
    elements = _CHUNK_ELEMENTS.get(own_key_N.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    rows = max(1, elements // len(feature_key_F))
    for start in range(0, len(own_key_N), rows):
        part = slice(start, start + rows)
        torch.lt(_hashed(own_key_N[part, None] + feature_key_F), below, out=drop_NF[part])
    return drop_NF


def _hashed(x: Tensor) -> Tensor:
    """A finaliser like that of MurmurHash3 (Appleby 2011), in place, on int32.

    torch shifts signed numbers arithmetically. What that loses of the uppermost bit, the next product puts
    back; the last shift, which only concerns lower bits than decide, is left out.
    """
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x *= 0x735A2D97
    return x


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014), on int64."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """int64 to the right, filled with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _upper_half(x: Tensor) -> Tensor:
    return (x >> 32).to(torch.int32)


def _signed(number: int) -> int:
    """The int64 with the lower 64 bits of `number`."""
    return (number + 2**63) % 2**64 - 2**63
