"""Fetch models from a hub, after asking whether the hub answers at all.

Libraries would try for minutes. The files that Embedline reads itself are fetched here, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from embedline.errors import ModelHostUnavailable, ProviderError, ProviderMisconfigured
from embedline.model_host.faults import describe

if TYPE_CHECKING:
    from embedline.model_host.host_settings import HostSettings

# Seconds that a hub has for its first answer. Without this limit the libraries ask for each file and repeat, which took
# 78 s when a name was not resolved.
ANSWER_SECONDS = 8.0
# Statuses of a proxy that cannot reach the hub.
_GATEWAY_ERRORS = (502, 503, 504)
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_GRAPH_FILES = ["*.json", "onnx/model.onnx", "model.onnx"]
# Other forms of the same weights, in folders of their own.
_OTHER_FORMS = ["onnx/*", "openvino/*"]


def require_hub(settings: HostSettings) -> None:
    """Return if the hub answers or the model is on this machine.

    In the second case the libraries are told to stay offline. Raises ModelHostUnavailable within ANSWER_SECONDS if the
    hub is silent, ProviderMisconfigured if it may not be asked.
    """
    if os.path.isdir(settings.model):
        return
    failure = _silence(settings)
    if failure is None:
        return
    if not _is_cached(settings):
        raise failure
    _stay_offline()


def chosen_directory(settings: HostSettings) -> str | None:
    """Return the directory of a hub's model that needs no torch, a static one.

    None for another model.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = hf_hub_download(settings.model, "modules.json", revision=settings.revision)
    except EntryNotFoundError:
        return None
    with open(path, encoding="utf-8") as file:
        modules = json.load(file)
    if not modules or not str(modules[0].get("type", "")).endswith(".StaticEmbedding"):
        return None
    return snapshot(settings)


def snapshot(settings: HostSettings, *, with_graph: bool = False) -> str:
    """Return the directory of a model's files on this machine; fetch missing ones.

    `with_graph` takes the model's graph for onnxruntime in place of its weights.
    """
    if os.path.isdir(settings.model):
        return settings.model
    from huggingface_hub import snapshot_download

    if with_graph:
        return str(snapshot_download(settings.model, revision=settings.revision, allow_patterns=_GRAPH_FILES))
    return str(
        snapshot_download(
            settings.model, revision=settings.revision, allow_patterns=_FILES, ignore_patterns=_OTHER_FORMS
        )
    )


def _silence(settings: HostSettings) -> ProviderError | None:
    """Return the reason why the hub cannot be asked, None if it answers.

    A refusal is an answer, because loading the model explains it.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    answer: Future[None] = Future()

    def ask() -> None:
        # In a thread of its own, because nothing limits the time for resolving a name.
        try:
            _ask(settings)
        except BaseException as error:
            answer.set_exception(error)
        else:
            answer.set_result(None)

    threading.Thread(target=ask, name="embedline-hub", daemon=True).start()
    try:
        answer.result(ANSWER_SECONDS)
    except OfflineModeIsEnabled:
        return ProviderMisconfigured(
            f'model "{settings.model}" is not on this machine, and HF_HUB_OFFLINE forbids to fetch it',
            hint=_hint(settings),
        )
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) in _GATEWAY_ERRORS:
            return _unreachable(settings, describe(error))
    except TimeoutError as error:
        detail = describe(error) if answer.done() else f"It gave no answer within {ANSWER_SECONDS:g} s."
        return _unreachable(settings, detail)
    except Exception as error:
        return _unreachable(settings, describe(error))
    return None


def _ask(settings: HostSettings) -> None:
    from huggingface_hub import HfApi

    HfApi().model_info(settings.model, revision=settings.revision, timeout=ANSWER_SECONDS)


def _unreachable(settings: HostSettings, detail: str) -> ModelHostUnavailable:
    from huggingface_hub import constants

    return ModelHostUnavailable(
        f'cannot fetch model "{settings.model}": the hub {constants.ENDPOINT} cannot be reached',
        detail=detail,
        hint=_hint(settings),
    )


def _hint(settings: HostSettings) -> str:
    name = settings.model.rpartition("/")[2]
    return (
        f"Copy the model to the server and give its directory: embedline.create_model(..., '/srv/models/{name}');"
        " or start the server with https_proxy or HF_ENDPOINT set."
    )


def _is_cached(settings: HostSettings) -> bool:
    from huggingface_hub import snapshot_download

    with contextlib.suppress(Exception):
        snapshot_download(settings.model, revision=settings.revision, local_files_only=True)
        return True
    return False


def _stay_offline() -> None:
    """Tell the libraries of this process and of its children to stay offline.

    Otherwise they wait for the hub again, file by file.
    """
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    setting: Any = constants
    setting.HF_HUB_OFFLINE = True
