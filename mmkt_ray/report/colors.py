"""The page's colours as CSS variables with a light and a dark value each,
and what stands for them while a figure is drawn.

matplotlib knows no CSS variables: it draws in stand-ins, hexadecimal colours that nothing else has, and svg.py puts
the variables in their place. So one figure serves light and dark pages, and a model has one colour in every figure
and table. The models' colours start from those of Okabe & Ito (2008),
darkened on white and lightened on black to a contrast of 3 or more.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Mapping, Sequence

PAGE_COLORS = {
    "ink": ("#1f2328", "#e6edf3"),
    "soft": ("#59636e", "#9198a1"),
    "line": ("#d0d7de", "#3d444d"),
    "page": ("#ffffff", "#0d1117"),
    "raised": ("#f6f8fa", "#161b22"),
    "good": ("#1a7f37", "#3fb950"),
    "bad": ("#cf222e", "#f85149"),
    "warn": ("#9a6700", "#d29922"),
    "accent": ("#0969a8", "#56b4e9"),
    "on-middle": ("#1f2328", "#0d1117"),  # what is written on two thirds of it
    "on-accent": ("#ffffff", "#0d1117"),  # what is written on all of it
}
MODEL_COLORS = (
    ("#0072b2", "#4ba3e3"),
    ("#b26a00", "#f0a830"),
    ("#00805c", "#2fc79a"),
    ("#b0478a", "#e08fbf"),
    ("#7a4fbf", "#b39bff"),
    ("#c8420a", "#ff8a5c"),
    ("#00798c", "#5fd3e6"),
    ("#6b7000", "#c0c84a"),
    ("#7a4a2b", "#c99a78"),
    ("#a3003f", "#ff7aa0"),
)
NO_MODALITY = ("#6e7681", "#9aa4ae")  # models that read nothing

_NAMES = tuple(PAGE_COLORS)
INK, SOFT, LINE, PAGE, RAISED, GOOD, BAD, WARN, ACCENT, ON_MIDDLE, ON_ACCENT = (
    f"#fe01{i:02x}" for i in range(len(_NAMES))
)
_STAND_IN = re.compile(r"#f([de])([0-9a-f]{4})\b")


def model_colors(models: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Model -> the stand-in of its colour, no two alike. models: name -> the modalities that it reads."""
    return {name: f"#fd{i:04x}" for i, name in enumerate(models)}


def values(models: Mapping[str, Sequence[str]]) -> list[tuple[str, str, str]]:
    """(variable, light, dark) of all colours of a page with these models."""
    found = [(name, *both) for name, both in PAGE_COLORS.items()]
    number = 0
    for i, modalities in enumerate(models.values()):
        both = NO_MODALITY
        if modalities:
            both, number = _model_color(number), number + 1
        found.append((f"m{i}", *both))
    return found


def css(models: Mapping[str, Sequence[str]]) -> str:
    """The variables as a style sheet."""
    light, dark = (" ".join(f"--{v[0]}: {v[k]};" for v in values(models)) for k in (1, 2))
    return (
        f":root {{ color-scheme: light dark; {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    )


def with_variables(text: str) -> str:
    """The text with variables in place of stand-ins."""

    def variable(found: re.Match[str]) -> str:
        number = int(found[2], 16)
        return f"var(--m{number})" if found[1] == "d" else f"var(--{_NAMES[number - 0x100]})"

    return _STAND_IN.sub(variable, text)


def _model_color(number: int) -> tuple[str, str]:
    """The colour of a model by its number; beyond the listed ones hues that turn by the golden angle."""
    if number < len(MODEL_COLORS):
        return MODEL_COLORS[number]
    hue = number * 0.381966 % 1
    light, dark = (
        "#" + "".join(f"{round(255 * c):02x}" for c in colorsys.hls_to_rgb(hue, lightness, 0.55))
        for lightness in (0.33, 0.7)
    )
    return light, dark
