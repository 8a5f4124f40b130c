"""Serve the web UI of one database or of several."""

from batchq.postgres.databases import Database
from batchq.settings import Settings
from batchq.web.server import Web, server_of
from batchq.web.settings import WebSettings
from batchq.web.several import SeveralWeb


def serve(settings: Settings, databases: list[Database], web_settings: WebSettings) -> None:
    """Serve the web UI of the *databases*, or of the one of *settings* if there are none, until SIGTERM or SIGINT."""
    web = SeveralWeb(databases, web_settings) if databases else Web(settings.require_dsn(), web_settings)
    server_of(web).run()
