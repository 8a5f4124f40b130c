"""The orders."""

from django.db import models


class Order(models.Model):
    """An order, and whether its receipt was sent."""

    id = models.BigAutoField(primary_key=True)
    email = models.EmailField()
    is_receipt_sent = models.BooleanField(default=False)
