"""Texts that somebody hostile would choose: they steer a terminal, hide, forge lines, or are markup."""

import re
import unicodedata

COPY = "\x1b]52;c;ZXZpbA==\x07"  # sets the clipboard
CLEAR = "\x1b[2J\x1b[H"
LINK = "\x1b]8;;https://evil.example\x1b\\here\x1b]8;;\x1b\\"
EIGHT_BITS = "\x9b31m\x9d52;c;ZXZpbA==\x9c"  # the same, as C1 characters
TURNED = "\u202egnp.exe\u2066\u200f"
WITHOUT_WIDTH = "\u200b\u2060\ufeff\u00ad\u180b\ufe01\U000e0041"
STEERING = COPY + CLEAR + LINK + EIGHT_BITS + TURNED + WITHOUT_WIDTH
SHOWN = "⟨U+001B⟩]52;c;ZXZpbA==⟨U+0007⟩⟨U+001B⟩[2J"
FORGING = "x\nforged line\r\n\x0bforged too\u2028forged three\x85forged four\tcell"
MARKUP = "oops[/green] [link=https://evil.example]x[/link] [bold red]y :skull: [@click=app.quit]z[/]"

# What the characters of these categories do is invisible; but signs that come before a number (U+0600) are seen.
INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
SEEN = set("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
WITHOUT_CATEGORY = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def is_invisible(char: str) -> bool:
    """Return whether a character would steer or hide: by its category, whatever batchq thinks of it."""
    return char not in SEEN and (unicodedata.category(char) in INVISIBLE or bool(WITHOUT_CATEGORY.match(char)))


def invisible_in(text: str, but: str = "\n") -> list[str]:
    """Return the invisible characters of a text."""
    return [f"U+{ord(char):04X}" for char in text if char not in but and is_invisible(char)]


def without_colors(text: str) -> str:
    """Return what a terminal was sent without the colors, which are batchq's own."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
