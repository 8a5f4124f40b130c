"""Models for Django's admin, of views and tables of batchq's own: Django neither creates nor changes them."""

from django.db import models


class Batch(models.Model):
    """A row of batchq.status."""

    id = models.BigIntegerField(primary_key=True)
    queue = models.TextField()
    kind = models.TextField()
    status = models.TextField()
    stored_status = models.TextField()
    progress_percent = models.IntegerField(null=True)
    items_total = models.IntegerField(null=True)
    items_done = models.IntegerField()
    items_failed = models.IntegerField()
    attempt = models.SmallIntegerField()
    max_attempts = models.SmallIntegerField()
    priority = models.SmallIntegerField()
    key = models.TextField(null=True)
    unique_key = models.TextField(null=True)
    claimed_by = models.TextField(null=True)
    last_error = models.TextField(null=True)
    next_run_at = models.DateTimeField(null=True)
    created_at = models.DateTimeField()
    claimed_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)

    class Meta:
        """An unmanaged model of a view."""

        managed = False
        db_table = '"batchq"."status"'
        verbose_name_plural = "batches"
        default_permissions = ("view",)
        permissions = (("operate_batch", "Can cancel and retry batches"),)

    def __str__(self) -> str:
        return f"{self.id} ({self.kind})"


class QueueKind(models.Model):
    """A row of batchq.queues: what the admin's filters offer."""

    queue = models.TextField(primary_key=True)
    kind = models.TextField()

    class Meta:
        """An unmanaged model of a view."""

        managed = False
        db_table = '"batchq"."queues"'
        default_permissions = ()
