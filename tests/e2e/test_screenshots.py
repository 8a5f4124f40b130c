"""The docs' pictures of page and terminal are made by a command, and show what they are to show."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.component.rows import Conn
from tests.instruments.screenshots import FOLDER, make
from tests.support.alone import run_alone

PNG = b"\x89PNG\r\n\x1a\n"
SHOWN = {
    "queues": ("import_contacts", "Oldest wait", "finished"),
    "running": ("geocode", "stalled", "left", "of 1,000"),
    "failures": ("ValueError: no @ in <value>", "TimeoutError"),
}


def test_the_command_makes_every_picture_that_the_docs_have(conn: Conn, admin_dsn: str, tmp_path: Path) -> None:
    make(conn, admin_dsn, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in FOLDER.iterdir()}
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in names if name.endswith(".png"))
    for tab, texts in SHOWN.items():
        picture = (tmp_path / f"top-{tab}.svg").read_text()
        shown = "".join(ElementTree.fromstring(picture).itertext()).replace("\N{NO-BREAK SPACE}", " ")
        assert [text for text in texts if text not in shown] == [], shown
        assert "url(http" not in picture, "it loads nothing from elsewhere"


if __name__ == "__main__":
    run_alone(__file__)
