"""What lies over the screen of ``batchq top``: the keys, the actions of a row, and what is asked before each."""

from typing import Any, ClassVar

import psycopg
from rich.console import Group
from rich.table import Table
from rich.text import Text
from textual import events, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Input, OptionList, Static

from batchq.cli.top.deeds import Deed
from batchq.common.terminal import one_line, styled
from batchq.errors import OutcomeUnknown
from batchq.operate.refusals import refusal

KEYS = (
    ("1 to 8", "choose the table"),
    ("arrows, PgUp, PgDn", "choose a row; it stays chosen when rows are read again"),
    ("Enter", "open a batch, a database, or the running and failed batches of a queue or kind"),
    ("a", "actions on the chosen row; each asks before it changes anything"),
    ("/", "filter: words, or queue:mail kind:send status:failed; all must match"),
    ("Esc", "clear the filter; go back"),
    ("s", "sort by the next column; or click a title"),
    ("r", "reverse the order"),
    ("g", "group queues by queue, failures by error; again: one by one"),
    ("p", "pause the display; again: resume"),
    ("t", "light or dark colors"),
    ("?", "show these keys"),
    ("q", "quit, or go back"),
)


class Dialog(ModalScreen[Any]):
    """A box over the rest of the screen."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Back")]

    def action_leave(self) -> None:
        """Close it without doing anything."""
        self.dismiss(None)


class Help(Dialog):
    """All keys."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark,enter", "leave", "Back")]

    def compose(self) -> ComposeResult:
        """Yield the widgets."""
        with VerticalScroll(id="box"):
            yield Static(Text("Keys of batchq top", style="bold"), markup=False)
            table = Table.grid(padding=(0, 2, 0, 0))
            for key, effect in KEYS:
                table.add_row(Text(key, style="bold", no_wrap=True), effect)
            yield Static(table, markup=False)
            yield Static(Text("Esc closes this."), markup=False)


class Menu(Dialog):
    """The actions of a row; the result is the chosen deed."""

    def __init__(self, deeds: list[Deed]) -> None:
        super().__init__()
        self.deeds = deeds

    def compose(self) -> ComposeResult:
        """Yield the widgets."""
        with Vertical(id="box"):
            yield Static(
                Text("Actions: press a letter, or choose and press Enter; Esc goes back", style="bold"), markup=False
            )
            yield OptionList(*(Text.assemble((deed.letter, "bold"), "  ", styled(deed.title)) for deed in self.deeds))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Choose it."""
        self.dismiss(self.deeds[event.option_index])

    def on_key(self, event: events.Key) -> None:
        """Choose by letter."""
        for deed in self.deeds:
            if event.character == deed.letter:
                event.stop()
                self.dismiss(deed)
                return


class Confirmation(Dialog):
    """Says exactly what will be changed, asks, does it, and shows the result until it is closed.

    If it could not be done, the error is shown and all that was typed is still there.
    """

    def __init__(self, deed: Deed) -> None:
        super().__init__()
        self.deed = deed
        self.is_done = False
        self.result = ""

    def compose(self) -> ComposeResult:
        """Yield the widgets."""
        argument = self.deed.argument
        with VerticalScroll(id="box", can_focus=False):
            yield Static(styled(self.deed.title, "bold"), markup=False)
            yield Static(styled(self.deed.what), markup=False)
            yield Static(styled(self.deed.explanation), markup=False)
            if argument:
                with Horizontal(classes="field"):
                    yield Static(f"{argument.label}:", markup=False)
                    yield Input(argument.suggested, id="argument")
            with Horizontal(classes="field"):
                yield Static("Reason (optional):", markup=False)
                yield Input(self.deed.default_reason or "", id="reason")
            yield Static("", id="result", markup=False)
            with Horizontal(id="buttons"):
                yield Button(
                    self.deed.title.partition(":")[0], id="do", variant="error" if self.deed.is_grave else "primary"
                )
                yield Button("Go back", id="leave")

    def on_mount(self) -> None:
        """Begin at what is to be given, or at the button; for a grave deed at the one that does nothing."""
        name = "argument" if self.deed.argument else "leave" if self.deed.is_grave else "do"
        self.query_one(f"#{name}").focus()

    def on_input_submitted(self) -> None:
        """Go on to the next one; nothing is done before the button is pressed."""
        self.focus_next()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Do it, or go back."""
        if event.button.id == "leave":
            self.dismiss(self.is_done)
        elif not self.is_done:
            self._begin()

    def _begin(self) -> None:
        change: dict[str, Any] = {}
        if self.deed.argument:
            try:
                change = self.deed.argument.change(self.query_one("#argument", Input).value.strip())
            except ValueError as error:
                self._show(str(error), is_error=True)
                self.query_one("#argument").focus()
                return
        self.query_one("#do", Button).disabled = True
        self._show("working ...")
        self._act(change, self.query_one("#reason", Input).value.strip() or None)

    @work(thread=True, exit_on_error=False)
    def _act(self, change: dict[str, Any], reason: str | None) -> None:
        """Do it in a thread."""
        try:
            text, is_error = self.app.source.act(self.deed, change, reason), False  # type: ignore[attr-defined]
        except OutcomeUnknown as error:
            text, is_error = f"it is unknown whether this was done; look before you repeat it: {error}", True
        except psycopg.Error as error:
            text, is_error = refusal(error) or str(error), True
        except Exception as error:
            text, is_error = str(error), True
        self.app.call_from_thread(self._end, one_line(text), is_error)

    def _end(self, text: str, is_error: bool) -> None:
        if not self.is_attached:
            self.app.notify(text, severity="error" if is_error else "information", timeout=30, markup=False)
            return
        self.is_done = not is_error
        self._show(text, is_error)
        self.query_one("#do", Button).disabled = self.is_done
        leave = self.query_one("#leave", Button)
        leave.label = "Close" if self.is_done else "Go back"
        leave.focus()
        self.app.refresh_soon()  # type: ignore[attr-defined]

    def _show(self, text: str, is_error: bool = False) -> None:
        self.result = text
        style = "bold red" if is_error else "bold green" if self.is_done else ""
        self.query_one("#result", Static).update(Group(Text(), styled(text, style)) if text else "")

    def action_leave(self) -> None:
        """Close it."""
        self.dismiss(self.is_done)
