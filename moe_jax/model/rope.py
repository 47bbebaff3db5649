"""Rotary positions (RoFormer, arXiv 2104.09864), and the ways in which models stretch them.

A way is frequencies, made once from the config, and a scale of cosine and sine:

    plain     theta^(-2i/Q)
    linear    all divided by `factor` (arXiv 2306.15595)
    yarn      low ones divided, high ones kept, a ramp between; cosine and sine scaled (2309.00071)
    llama3    the same with another ramp, in wavelengths (Llama 3.1, arXiv 2407.21783)
    longrope  each divided by its own factor; other factors for sequences longer than those of
              pre-training (arXiv 2402.13753)

Frequencies are rounded to float32 where transformers rounds them: at position 100,000 the last bit
of a frequency is a hundredth of a radian.

Axes: B batch, S tokens at hand, H heads, Q values turned in each head, F = Q / 2 frequencies.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.config import RopeConfig


@dataclasses.dataclass(frozen=True)
class Rope:
    """Attributes:
    frequencies: F numbers, radians a position.
    scale: of cosine and sine.
    long_frequencies: those of sequences that reach position `long_from`; () = the same.
    interleaved: pairs are values (2i, 2i + 1), not (i, i + Q/2). They are turned apart: the result
      has all first values in front, in queries and keys alike.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    long_frequencies: tuple[float, ...] = ()
    long_from: int = 0
    interleaved: bool = False


def of_config(config: RopeConfig, theta: float, width: int) -> Rope:
    """The rotary positions of a model.

    Args:
      theta: base of the frequencies.
      width: Q, values turned in each head.
    """
    # float32 exponents, a power rounded once, and its reciprocal: as transformers rounds.
    exponent_F = (np.arange(0, width, 2).astype(np.float32) / np.float32(width)).astype(np.float64)
    power_F = (theta**exponent_F).astype(np.float32)
    make = {
        "plain": _plain,
        "linear": _linear,
        "yarn": _yarn,
        "llama3": _llama3,
        "longrope": _longrope,
    }
    made = make[config.kind](config, power_F, theta)
    return dataclasses.replace(made, interleaved=config.interleaved)


def plain(theta: float, width: int) -> Rope:
    """Rotary positions as they were first."""
    return of_config(RopeConfig(), theta, width)


def logit_scale(config: RopeConfig) -> float:
    """What latent attention multiplies its logits with: YaRN's temperature (arXiv 2405.04434)."""
    if config.kind == "plain" or not config.mscale_all_dim:
        return 1.0
    return _temperature(config.factor, config.mscale_all_dim) ** 2


def rotate(
    x_BSHQ: Float[Array, "B S H Q"],
    position_BS: Int[Array, "B S"],
    rope: Rope,
    reached_BS: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S H Q"]:
    """Turns each pair of values by position x frequency.

    Args:
      reached_BS: the last position of each token's text, where the tokens at hand are not those of
        one text a row; None = the last one of the row.
    """
    if reached_BS is None:
        reached_BS = position_BS.max(axis=1, keepdims=True)
    angle_BSF = position_BS.astype(jnp.float32)[:, :, None] * _frequency(rope, reached_BS)
    cos, sin = (rope.scale * turn(angle_BSF)[:, :, None] for turn in (jnp.cos, jnp.sin))
    x32_BSHQ = x_BSHQ.astype(jnp.float32)
    if rope.interleaved:
        first, second = x32_BSHQ[..., 0::2], x32_BSHQ[..., 1::2]
    else:
        first, second = jnp.split(x32_BSHQ, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BSHQ.dtype)


def _frequency(rope: Rope, reached_BS: jax.Array) -> jax.Array:
    """[1, 1, F], or of each text [B, S or 1, F]"""
    frequency_11F = jnp.array(rope.frequencies, jnp.float32)[None, None]
    if not rope.long_frequencies:
        return frequency_11F
    long_11F = jnp.array(rope.long_frequencies, jnp.float32)[None, None]
    is_long_BS = reached_BS >= rope.long_from
    return jnp.where(is_long_BS[:, :, None], long_11F, frequency_11F)


def _plain(config: RopeConfig, power_F: np.ndarray, theta: float) -> Rope:
    return Rope(_numbers(1 / power_F))


def _linear(config: RopeConfig, power_F: np.ndarray, theta: float) -> Rope:
    return Rope(_numbers(1 / power_F / np.float32(config.factor)))


def _yarn(config: RopeConfig, power_F: np.ndarray, theta: float) -> Rope:
    """Pairs that turn more than `beta_fast` times in pre-training stay, less than `beta_slow` times
    are divided by the factor."""
    width = 2 * len(power_F)

    def pair_of(turns: float) -> float:
        """The pair that turns so many times over the positions of pre-training."""
        return width * math.log(config.original_seq_len / (turns * 2 * math.pi)) / (
            2 * math.log(theta)
        )  # fmt: skip

    low, high = pair_of(config.beta_fast), pair_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    pair_F = np.arange(len(power_F), dtype=np.float32)
    ramp_F = np.clip((pair_F - np.float32(low)) / np.float32(high - low), 0, 1)
    kept_F = 1 - ramp_F
    divided_F = 1 / (np.float32(config.factor) * power_F)
    frequency_F = divided_F * (1 - kept_F) + 1 / power_F * kept_F
    scale = _temperature(config.factor, 1.0)
    if config.mscale and config.mscale_all_dim:
        scale = _temperature(config.factor, config.mscale)
        scale /= _temperature(config.factor, config.mscale_all_dim)
    return Rope(_numbers(frequency_F), config.attention_factor or scale)


def _temperature(factor: float, slope: float) -> float:
    """YaRN's, 0.1 slope ln(factor) + 1."""
    return 0.1 * slope * math.log(factor) + 1 if factor > 1 else 1.0


def _llama3(config: RopeConfig, power_F: np.ndarray, theta: float) -> Rope:
    """Wavelengths above original / `low_freq_factor` are multiplied by the factor, those below
    original / `high_freq_factor` stay."""
    frequency_F = 1 / power_F
    wavelength_F = np.float32(2 * math.pi) / frequency_F
    original, low, high = config.original_seq_len, config.low_freq_factor, config.high_freq_factor
    factor = np.float32(config.factor)
    kept_F = (np.float32(original) / wavelength_F - np.float32(low)) / np.float32(high - low)
    between_F = (1 - kept_F) * frequency_F / factor + kept_F * frequency_F
    made_F = np.where(wavelength_F > original / low, frequency_F / factor, between_F)
    return Rope(_numbers(np.where(wavelength_F < original / high, frequency_F, made_F)))


def _longrope(config: RopeConfig, power_F: np.ndarray, theta: float) -> Rope:
    """Unless given, the scale is sqrt(1 + ln(factor) / ln(original))."""
    scale = 1.0
    if config.factor > 1:
        scale = math.sqrt(1 + math.log(config.factor) / math.log(config.original_seq_len))
    short_F, long_F = (
        _numbers(1 / (np.array(factors, np.float32) * power_F))
        for factors in (config.short_factor, config.long_factor)
    )
    return Rope(short_F, config.attention_factor or scale, long_F, config.original_seq_len)


def _numbers(frequency_F: np.ndarray) -> tuple[float, ...]:
    assert frequency_F.dtype == np.float32
    return tuple(frequency_F.tolist())
