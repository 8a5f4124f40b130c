"""The pages of the shop."""

from django.contrib import admin
from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.urls import path

from shop.models import Order
from shop.tasks import send_receipt


@transaction.atomic  # the task exists if, and only if, the order does
def place_order(request: HttpRequest) -> JsonResponse:
    order = Order.objects.create(email=request.POST["email"])
    return JsonResponse({"result": send_receipt.enqueue(order.pk).id})


def show_result(_: HttpRequest, result_id: str) -> JsonResponse:
    return JsonResponse({"status": send_receipt.get_result(result_id).status})


urlpatterns = [
    path("order", place_order),
    path("result/<result_id>", show_result),
    path("admin/", admin.site.urls),
]
