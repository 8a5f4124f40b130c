"""Django: a backend of its tasks, commands that run them, and an admin.

``from batchq.contrib.django import fresh_connections`` for handlers of your own that use the ORM.
"""

from batchq.contrib.django.connections import fresh_connections

__all__ = ["fresh_connections"]
