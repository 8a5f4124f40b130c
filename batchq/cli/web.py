"""`batchq web`: the page in a browser. Needs the extra "web"."""

from argparse import Namespace

from batchq.cli.commands import database, settings_of
from batchq.common import log
from batchq.common.terminal import errors, styled
from batchq.errors import ConfigError


def web(options: Namespace) -> int:
    """Serve the page until SIGTERM or Ctrl-C."""
    try:
        from batchq.web import server  # its extra need not be installed for the other commands
        from batchq.web.settings import WebSettings
    except ModuleNotFoundError as error:
        raise ConfigError(f"batchq web needs the extra: pip install 'batchq[web]' (no module {error.name!r})") from None
    settings = settings_of(options)
    log.configure(settings.log_format, settings.log_level)
    web_settings = WebSettings.load(host=options.host, port=options.port, read_only=options.read_only or None)
    with database(options):  # says what is wrong with the DSN or the schema, before anybody looks at a page
        pass  # a log-in of its own, once; the page's pool has up to four others, however many look
    log.configure(settings.log_format, settings.log_level)  # a visitor's address may be in a line
    errors.print(styled(f"http://{shown_host(web_settings.host)}:{web_settings.port}/"), soft_wrap=True)
    server.serve(settings, web_settings)
    return 0


def shown_host(host: str) -> str:
    """Return a host as it stands in an address."""
    return f"[{host}]" if ":" in host else host
