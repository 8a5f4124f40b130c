"""The tasks of the shop."""

try:
    from django.tasks import task
except ImportError:  # Django 5.2
    from django_tasks import task

from shop.models import Order


@task
def send_receipt(order_id: int) -> str:
    order = Order.objects.get(pk=order_id)
    order.is_receipt_sent = True  # here your mail is sent
    order.save()
    return f"receipt sent to {order.email}"
