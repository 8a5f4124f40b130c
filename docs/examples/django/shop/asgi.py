"""The shop under ASGI, with its queue at /queue/. Run: uvicorn shop.asgi:application"""

import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")
application = get_asgi_application()

from batchq.contrib.django.web import with_web_ui  # noqa: E402 (get_asgi_application sets Django up)

application = with_web_ui(application, "/queue")
