"""The app of ``batchq top``: it asks the question of the view on the screen again and again, in a thread."""

import os
import time
from collections.abc import Callable
from typing import Any, ClassVar

from rich.terminal_theme import TerminalTheme
from textual import work
from textual.app import App
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.timer import Timer

from batchq.cli.top.main_view import MainView
from batchq.cli.top.several import DatabasesView, DatabaseView, Several
from batchq.cli.top.source import Source
from batchq.cli.top.views import View

_REST_FACTOR, _MIN_REST_SECONDS, _MAX_REST_SECONDS = 100, 1.0, 10.0
_LIGHT, _DARK = "textual-light", "textual-dark"
_LIGHT_BACKGROUNDS = ("7", "9", "10", "11", "12", "13", "14", "15")  # of the 16 colors of a terminal
# The 8 colors of cells, and their bright variants: each can be read on every background of the theme.
_ON_DARK = [(0, 0, 0), (255, 150, 140), (125, 220, 140), (245, 200, 76), (150, 190, 255), (240, 170, 240),
            (111, 220, 220), (230, 230, 230)]  # fmt: skip
_ON_LIGHT = [(0, 0, 0), (140, 0, 20), (0, 70, 25), (90, 55, 0), (10, 65, 160), (105, 10, 105), (0, 65, 75),
             (40, 40, 40)]  # fmt: skip
_GREY_ON_DARK, _GREY_ON_LIGHT = (170, 180, 190), (75, 85, 95)


class Top(App[None]):
    """The screen. *source* reads and acts.

    every_seconds: time between two reads; None: a hundred times as long as a read took, from 1 to 10 s. is_read_only:
    offer no actions. is_light: colors for a light terminal; None: as the terminal says in COLORFGBG, else dark.
    several: the databases, if there are several; *source* is then that of the one that was opened last.
    """

    TITLE = "batchq top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #state { height: auto; max-height: 3; padding: 0 1 0 0; }
    TabbedContent, ContentSwitcher, LiveTable { height: 1fr; }
    TabPane { padding: 0; }
    Tab { padding: 0 1 0 0; color: $foreground; }
    FooterKey .footer-key--key, FooterKey .footer-key--description { color: $foreground; }
    LiveTable { scrollbar-size-vertical: 1; scrollbar-size-horizontal: 1; }
    LiveTable > .datatable--cursor, LiveTable:focus > .datatable--cursor { background: $primary 15%;
                                                                           text-style: bold; }
    #filter-line { height: 1; display: none; }
    #filter { height: 1; border: none; padding: 0; background: $panel; display: none; }
    #page { height: 1fr; scrollbar-size-vertical: 1; }
    Dialog { align: center middle; }
    Dialog > #box { width: 90%; max-width: 100; height: auto; max-height: 95%; border: round $primary; padding: 0 1;
                    background: $surface; }
    Dialog Static { width: 1fr; height: auto; }
    Dialog Input, Dialog Input:focus { border: none; height: 1; padding: 0 1; background: $panel; }
    Dialog .field { height: 1; margin-top: 1; }
    Dialog .field Static { width: 18; }
    Dialog #buttons { height: 1; margin-top: 1; }
    Dialog Button, Dialog Button.-primary, Dialog Button.-error { border: none; height: 1; min-width: 10;
                                                                  margin-right: 2; }
    Dialog Button.-error { background: $error-darken-2; color: white; }
    Dialog Button:focus { text-style: bold reverse; }
    Dialog OptionList, Dialog OptionList:focus { height: auto; max-height: 16; border: none; padding: 0;
                                                 background: $surface; }
    Dialog OptionList > .option-list--option-highlighted, Dialog OptionList:focus > .option-list--option-highlighted {
        color: $foreground; background: $panel; text-style: bold; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+c", "quit", "Quit", show=False)]

    def __init__(
        self,
        source: Source,
        every_seconds: float | None,
        is_read_only: bool = False,
        is_light: bool | None = None,
        several: Several | None = None,
    ) -> None:
        super().__init__()
        self._several = several
        self.database = ""  # the name of the one that is shown, of several
        self.source, self._every_seconds, self.is_read_only = source, every_seconds, is_read_only
        self.is_paused = False
        self._read: object | None = None  # stands for the read that is under way
        self._is_wanted = False
        self._rest: Timer | None = None
        self.ansi_theme_dark = TerminalTheme((18, 18, 18), (224, 224, 224), _ON_DARK, [_GREY_ON_DARK, *_ON_DARK[1:]])
        self.ansi_theme_light = TerminalTheme(
            (239, 239, 239), (20, 20, 20), _ON_LIGHT, [_GREY_ON_LIGHT, *_ON_LIGHT[1:]]
        )
        self.theme = _LIGHT if (is_light_terminal() if is_light is None else is_light) else _DARK

    def get_default_screen(self) -> Screen[Any]:
        """Return the first screen."""
        return DatabasesView(self._several.watch) if self._several else MainView()

    @property
    def view(self) -> View:
        """The view on the screen, or below a dialog."""
        return next(screen for screen in reversed(self.screen_stack) if isinstance(screen, View))

    @property
    def main(self) -> MainView:
        """The screen with the tables of a database."""
        return next(screen for screen in self.screen_stack if isinstance(screen, MainView))

    def open_database(self, name: str) -> None:
        """Show one of several databases."""
        if self._several:
            self.source = self._several.sources[name]
            self._turn_to(name)
            self.push_screen(DatabaseView(lambda: self._turn_to("")))

    def _turn_to(self, name: str) -> None:
        """Show a database, or all: "". Do not wait for the read that is under way: its database may be away."""
        self.database = name
        self._read = None

    def refresh_soon(self) -> None:
        """Read now; or as soon as the read that is under way has ended."""
        if self._read:
            self._is_wanted = True
        else:
            self._begin()

    def _begin(self) -> None:
        if self._rest:
            self._rest.stop()
        self._is_wanted = False
        views = [screen for screen in self.screen_stack if isinstance(screen, View)]
        if self.is_paused or not views or not views[-1].is_mounted:  # at the start it asks when it is; at the end never
            return
        self._read = object()
        self._ask(views[-1], views[-1].question(), self.source, self._read)

    @work(thread=True, exit_on_error=False)
    def _ask(self, view: View, question: Callable[[Source], Any], source: Source, read: object) -> None:
        """Ask in a thread; then show the answer or the error, and ask again after a rest."""
        began_at = time.monotonic()
        answer: Any = None
        error: Exception | None = None
        try:
            answer = question(source)
        except Exception as raised:
            error = raised
        rest = self.rest_seconds(time.monotonic() - began_at)
        self.call_from_thread(self._end, view, answer, error, rest, read)

    def _end(self, view: View, answer: Any, error: Exception | None, rest: float, read: object) -> None:
        if read is not self._read:  # nobody waits for it any more
            return
        self._read = None
        if view.is_attached and not self.is_paused:
            view.report(error) if error else view.take(answer)
        if self._is_wanted:
            self._begin()
        else:
            self._rest = self.set_timer(rest, self.refresh_soon)

    def rest_seconds(self, took_seconds: float) -> float:
        """Return how long to rest after a read: reads take at most a hundredth of one connection's time."""
        if self._every_seconds is not None:
            return self._every_seconds
        return min(max(_REST_FACTOR * took_seconds, _MIN_REST_SECONDS), _MAX_REST_SECONDS)

    def action_pause(self) -> None:
        """Stop or resume reading."""
        self.is_paused = not self.is_paused
        self.view.say_again()
        self.refresh_soon()

    def action_turn_colors(self) -> None:
        """Use the colors for a light terminal, or those for a dark one."""
        self.theme = _DARK if self.theme == _LIGHT else _LIGHT


def is_light_terminal() -> bool:
    """Return whether the terminal says that its background is light; most say nothing, and are dark."""
    return os.environ.get("COLORFGBG", "").rpartition(";")[2] in _LIGHT_BACKGROUNDS


def run(source: Source, every_seconds: float | None, is_read_only: bool, is_light: bool | None) -> None:
    """Show the screen until the user leaves it."""
    Top(source, every_seconds, is_read_only, is_light).run()


def run_several(several: Several, every_seconds: float | None, is_read_only: bool, is_light: bool | None) -> None:
    """Show the screen of several databases until the user leaves it."""
    Top(next(iter(several.sources.values())), every_seconds, is_read_only, is_light, several).run()
