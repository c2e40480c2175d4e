"""Settings of a project whose test database is a copy of the run's template, so Embedline is installed in it."""

import os
from urllib.parse import urlsplit

_server = urlsplit(os.environ["EMBEDLINE_DSN"])
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": _server.hostname,
        "PORT": _server.port,
        "USER": _server.username,
        "PASSWORD": _server.password,
        "NAME": "postgres",
        "TEST": {"NAME": os.environ["NOTES_DATABASE"], "TEMPLATE": os.environ["NOTES_TEMPLATE"]},
    }
}
INSTALLED_APPS = ["notes"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
SECRET_KEY = "unused"
USE_TZ = True
