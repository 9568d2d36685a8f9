"""Text meets WCAG AA (4.5 to 1) on every ground it stands on, in the light and in the dark scheme."""

import re

import pytest

from api.dashboard.rendering import STATIC

CSS = STATIC["dashboard.css"].body.decode()
GROUNDS = {
    "text": ("page", "panel", "sunk"),
    "muted": ("page", "panel", "sunk"),
    "accent": ("page", "panel", "accent-soft"),
    "accent-text": ("accent",),
    "good": ("panel", "sunk", "good-soft"),
    "bad": ("panel", "sunk", "bad-soft"),
    "warn": ("panel", "sunk", "warn-soft"),
    "live": ("panel", "live-soft"),
    # Cells mix these two: every mixture lies between them.
    "heat-ink": ("heat-low", "heat-high"),
    "heat-faint": ("heat-low", "heat-high"),
}


def _schemes() -> dict[str, dict[str, str]]:
    blocks = re.findall(r":root \{(.*?)\}", CSS, re.S)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in blocks)
    return {"light": light, "dark": {**light, **dark}}


def _luminance(colour: str) -> float:
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_measure_knows_its_extremes() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the known near miss


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(scheme: str) -> None:
    colours = _schemes()[scheme]

    too_faint = {
        f"{ink} on {ground}": round(contrast(colours[ink], colours[ground]), 2)
        for ink, grounds in GROUNDS.items()
        for ground in grounds
        if contrast(colours[ink], colours[ground]) < 4.5
    }

    assert too_faint == {}
