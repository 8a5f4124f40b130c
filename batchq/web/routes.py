"""Which address leads to which page."""

from starlette.routing import Route

from batchq.web.actions import Actions
from batchq.web.batch_list import BatchList
from batchq.web.batch_page import BatchPage
from batchq.web.chart_page import ChartPage
from batchq.web.chosen import Chosen
from batchq.web.copies import Copies
from batchq.web.failures import Failures
from batchq.web.flow_list import FlowList
from batchq.web.forms import Login
from batchq.web.keys import Keys
from batchq.web.kinds import Kinds
from batchq.web.limits import Limits
from batchq.web.pages import Pages
from batchq.web.reads import Reader
from batchq.web.rendering import Rendering
from batchq.web.schedules import Schedules
from batchq.web.settings import WebSettings
from batchq.web.spread import Spread
from batchq.web.workers import Workers


def routes_of(reader: Reader, pages: Pages, settings: WebSettings) -> list[Route]:
    """Return the routes of all pages and forms. A page adds its live part to *pages* when it is made here."""
    limits, schedules = Limits(reader, pages), Schedules(reader, pages)
    return [
        *_views(reader, pages, settings),
        Route("/limits", limits.show_all),
        Route("/schedules", schedules.show_all),
        Route("/schedules/of", schedules.show, methods=["GET"]),
        *_actions(reader, pages, limits, schedules),
    ]


def _views(reader: Reader, pages: Pages, settings: WebSettings) -> list[Route]:
    batch, failures = BatchPage(reader, pages, settings.trace_url), Failures(reader, pages)
    return [
        Route("/", pages.overview),
        Route("/batches", BatchList(reader, pages).show),
        Route("/batches/{id}", batch.show),
        Route("/batches/{id}/{name}.json", batch.raw),
        Route("/flow/{id}", pages.flow),
        Route("/failures", failures.groups),
        Route("/failures/group", failures.group),
        Route("/charts", ChartPage(reader, pages).show),
        Route("/flows", FlowList(reader, pages).show_all),
        Route("/spread", Spread(reader, pages).show_all),
        Route("/kinds", Kinds(reader, pages).show),
        Route("/workers", Workers(reader, pages).show_all),
        Route("/keys", Keys(reader, pages).show_all),
        Route("/audit", pages.audit),
    ]


def _actions(reader: Reader, pages: Pages, limits: Limits, schedules: Schedules) -> list[Route]:
    actions, chosen, copies = Actions(reader, pages), Chosen(reader, pages.page), Copies(reader, pages)
    return [
        Route("/chosen/{verb}", chosen.ask, methods=["GET"]),
        Route("/chosen/{verb}", chosen.do, methods=["POST"]),
        Route("/batches/{id}/copy", copies.ask, methods=["GET"]),
        Route("/batches/{id}/copy", copies.do, methods=["POST"]),
        Route("/limits/set", limits.ask, methods=["GET"]),
        Route("/limits/set", limits.do, methods=["POST"]),
        Route("/schedules/set", schedules.ask, methods=["GET"]),
        Route("/schedules/set", schedules.set, methods=["POST"]),
        Route("/schedules/{action}", schedules.ask_action, methods=["GET"]),
        Route("/schedules/{action}", schedules.act, methods=["POST"]),
        Route("/verbs/{verb}", actions.ask, methods=["GET"]),
        Route("/verbs/{verb}", actions.do, methods=["POST"]),
        Route("/bulk/{verb}", actions.ask_bulk, methods=["GET"]),
        Route("/bulk/{verb}", actions.do_bulk, methods=["POST"]),
    ]


def login_routes(pages: Rendering) -> list[Route]:
    """Return the routes of the log-in form."""
    login = Login(pages)
    return [
        Route("/login", login.ask, methods=["GET"]),
        Route("/login", login.log_in, methods=["POST"]),
        Route("/logout", login.log_out, methods=["POST"]),
    ]
