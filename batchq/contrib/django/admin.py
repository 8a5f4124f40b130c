"""Batches in Django's admin: a list with filters, a page for each batch, and actions. Everything else is read-only."""

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.views.main import ChangeList
from django.core.paginator import Paginator
from django.db import connections
from django.db.models import Q
from django.utils.html import format_html, format_html_join

from batchq.common.hidden import shown_text
from batchq.common.sealed import shortened
from batchq.contrib.django.models import Batch, QueueKind
from batchq.contrib.django.project import default_alias
from batchq.postgres import drivers
from batchq.postgres.statements import task_rows
from batchq.postgres.statements.views import STATUSES, STORED_STATUS

MOST_SELECTED = 1000
MOST_FAILED_ITEMS = 100


class OnePageAhead(Paginator):
    """Reads ids to the end of the page that is shown and one further: to count millions takes minutes."""

    page_shown = 1

    @cached_property
    def _ids(self) -> list[int]:
        return list(self.object_list.values_list("pk", flat=True)[: self.page_shown * self.per_page + 1])

    @property
    def count(self) -> int:
        """The number of rows up to there."""
        return len(self._ids)

    def page(self, number: Any) -> Any:
        """Return the rows of a page, by their ids: the search for them is not repeated."""
        number = self.validate_number(number)
        first = (number - 1) * self.per_page
        return self._get_page(self.object_list.filter(pk__in=self._ids[first : first + self.per_page]), number, self)


class BatchList(ChangeList):
    """A list whose rows always come from its paginator, also if there is one page."""

    def get_results(self, request: Any) -> None:
        """Set the attributes that the page shows."""
        super().get_results(request)
        if not self.multi_page:
            self.result_list = self.paginator.page(1).object_list


class _Filter(admin.SimpleListFilter):
    """A filter by a column; it offers the values of batchq.queues."""

    def lookups(self, request: Any, model_admin: Any) -> list[tuple[str, str]]:  # noqa: ARG002 (Django's)
        """Return the values to choose from, with the chosen one."""
        values = set(QueueKind.objects.using(default_alias()).values_list(self.parameter_name, flat=True))
        if chosen := request.GET.get(self.parameter_name):
            values.add(chosen)
        return [(value, value) for value in sorted(values)]

    def has_output(self) -> bool:
        """Show it also if there is one value, or none."""
        return True

    def queryset(self, request: Any, queryset: Any) -> Any:  # noqa: ARG002 (Django's)
        """Return the rows with the chosen value."""
        return queryset if self.value() is None else queryset.filter(**{self.parameter_name: self.value()})


class QueueFilter(_Filter):
    """By queue."""

    title = parameter_name = "queue"


class KindFilter(_Filter):
    """By kind."""

    title = parameter_name = "kind"


class StatusFilter(_Filter):
    """By status, as in batchq.status."""

    title = parameter_name = "status"

    def lookups(self, request: Any, model_admin: Any) -> list[tuple[str, str]]:  # noqa: ARG002 (Django's)
        """Return every status."""
        return [(status, status) for status in STATUSES]

    def queryset(self, request: Any, queryset: Any) -> Any:
        """Return the rows with the status; by the stored one, too, which excludes partitions."""
        chosen = super().queryset(request, queryset)
        status = self.value()
        if status is None:
            return chosen
        if status == "processing":  # of which some, those with parts, are stored as waiting; OR has an index for each
            return chosen.filter(Q(stored_status="processing") | Q(stored_status="waiting"))
        return chosen.filter(stored_status=STORED_STATUS.get(status, status))


def _action(verb: str, label: str) -> Any:
    """Return an admin action that does a verb to the chosen batches."""

    @admin.action(description=label, permissions=["operate"])
    def act(model_admin: "BatchAdmin", request: Any, queryset: Any) -> None:
        ids = list(queryset.order_by("pk").values_list("pk", flat=True)[: MOST_SELECTED + 1])
        if len(ids) > MOST_SELECTED:
            command = "cancel" if verb == "cancel" else "retry"
            text = f"More than {MOST_SELECTED} batches are selected. Use the command line: batchq {command} --help"
            model_admin.message_user(request, text, messages.ERROR)
            return
        connection, actor = connections[queryset.db], f"django:{request.user.get_username()}"
        for batch_id in ids:
            drivers.run(connection, task_rows.verb_on(verb, batch_id, "in Django's admin", actor))
        model_admin.message_user(request, f"{label}: {len(ids)} selected. It changes those whose status allows it.")

    act.__name__ = verb
    return act


@admin.register(Batch)
class BatchAdmin(admin.ModelAdmin):
    """The pages. Permissions: ``batchq.view_batch`` to see them, ``batchq.operate_batch`` for the actions."""

    actions = (_action("cancel", "Cancel"), _action("retry", "Retry"), _action("retry_items", "Retry failed items"))
    list_display = ("id", "queue", "kind", "status", "progress", "attempt", "created_at", "finished_at", "last_error")
    list_filter = (StatusFilter, QueueFilter, KindFilter)
    ordering = ("-id",)
    sortable_by = ()
    search_fields = ("id",)
    search_help_text = "Search by batch id"
    show_full_result_count = False
    list_max_show_all = 0
    paginator = OnePageAhead

    def get_queryset(self, request: Any) -> Any:
        """Return the batches of the backends' database."""
        return super().get_queryset(request).using(default_alias())

    def get_changelist(self, request: Any, **_: Any) -> type[BatchList]:  # noqa: ARG002 (Django's)
        """Return the class of the list."""
        return BatchList

    def get_paginator(self, request: Any, *args: Any, **options: Any) -> Any:
        """Return a paginator that knows which page is shown."""
        paginator = super().get_paginator(request, *args, **options)
        number = request.GET.get("p", "1")
        paginator.page_shown = max(int(number), 1) if number.isascii() and number.isdigit() else 1
        return paginator

    def get_search_results(self, request: Any, queryset: Any, search_term: str) -> tuple[Any, bool]:  # noqa: ARG002
        """Return the batch with that id."""
        text = search_term.strip()
        if not text:
            return queryset, False
        return (queryset.filter(pk=int(text)) if text.isascii() and text.isdigit() else queryset.none()), False

    def get_fields(self, request: Any, obj: Any = None) -> list[str]:  # noqa: ARG002 (Django's)
        """Return the content of a batch's page."""
        columns = [field.name for field in Batch._meta.fields if field.name not in ("stored_status", "last_error")]
        return [*columns, "payload", "result", "errors", "failed_items"]

    def has_add_permission(self, request: Any) -> bool:  # noqa: ARG002 (Django's)
        """Return that nobody adds a batch here."""
        return False

    def has_change_permission(self, request: Any, obj: Any = None) -> bool:  # noqa: ARG002 (Django's)
        """Return that nobody edits a batch."""
        return False

    def has_delete_permission(self, request: Any, obj: Any = None) -> bool:  # noqa: ARG002 (Django's)
        """Return that nobody deletes a batch."""
        return False

    def has_operate_permission(self, request: Any) -> bool:
        """Return whether the user may cancel and retry batches."""
        return bool(request.user.has_perm("batchq.operate_batch"))

    # --------------------------------------------------------------------------------------------- columns of its own

    @admin.display(description="progress")
    def progress(self, batch: Any) -> str:
        """Return the items worked, of all."""
        if batch.items_total is None:
            return "-"
        return f"{batch.items_done + batch.items_failed} of {batch.items_total}"

    def payload(self, batch: Any) -> str:
        """Return the payload."""
        return _block(_inputs(batch)[0])

    def result(self, batch: Any) -> str:
        """Return what the handler returned."""
        return _block(_inputs(batch)[1])

    def errors(self, batch: Any) -> str:
        """Return the errors of the attempts, the latest first."""
        errors = reversed(json.loads(_inputs(batch)[2] or "[]"))
        rows = ((error["attempt"], error["at"], error.get("traceback") or error["error"]) for error in errors)
        return format_html_join("", "<p>Attempt {}, {}</p><pre>{}</pre>", rows) or "-"

    def failed_items(self, batch: Any) -> str:
        """Return the first failed items, with their errors."""
        found = _rows_of(batch, task_rows.failed_items(batch.pk, MOST_FAILED_ITEMS))
        rows = ((row[0], shown_text(row[1]), shortened(row[2])) for row in found)
        return format_html_join("", "<p>{}: {}</p><pre>{}</pre>", rows) or "-"


def _inputs(batch: Any) -> tuple[Any, ...]:
    if not hasattr(batch, "_inputs"):
        batch._inputs = next(iter(_rows_of(batch, task_rows.inputs(batch.pk))), (None, None, None))
    found: tuple[Any, ...] = batch._inputs
    return found


def _rows_of(batch: Any, statement: Any) -> Iterator[tuple[Any, ...]]:
    return iter(drivers.run(connections[batch._state.db], statement))


def _block(text: str | None) -> str:
    return "-" if text is None else str(format_html("<pre>{}</pre>", shown_text(text)))
