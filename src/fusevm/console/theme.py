"""Light and dark: the browser's own preference until the user chooses; the choice is a cookie of the browser."""

from enum import StrEnum

COOKIE = "fuse-theme"


class Theme(StrEnum):
    AUTO = "auto"
    LIGHT = "light"
    DARK = "dark"


#: What a click leads to.
NEXT = {Theme.AUTO: Theme.DARK, Theme.DARK: Theme.LIGHT, Theme.LIGHT: Theme.AUTO}
ICONS = {Theme.AUTO: "brightness_auto", Theme.LIGHT: "light_mode", Theme.DARK: "dark_mode"}
#: As NiceGUI says it: None is the browser's preference.
IS_DARK = {Theme.AUTO: None, Theme.LIGHT: False, Theme.DARK: True}


def parse_theme(text: str) -> Theme:
    """The theme of a cookie; anything unknown is automatic."""
    return next((theme for theme in Theme if theme.value == text), Theme.AUTO)


def keep_script(theme: Theme) -> str:
    """JavaScript that keeps a choice for a year."""
    return f"document.cookie = '{COOKIE}={theme}; path=/; max-age=31536000; samesite=lax'"
