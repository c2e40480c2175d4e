"""Run a model in torch, with sentence-transformers."""

from __future__ import annotations

import functools
import gc
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from embedline.core.media import MEDIA, ModelInput
from embedline.errors import ProviderMisconfigured

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    from embedline.model_host.host_settings import HostSettings

# Characters at which the search for the best slice begins. Measured with all-MiniLM-L6-v2 on 2 cores (0.15 s a slice)
# and with a static model (0.02 s).
_CPU_CHARACTERS, _ACCELERATOR_CHARACTERS, _STATIC_CHARACTERS = 4096, 262_144, 131_072


class TorchBackend:
    """A sentence-transformers model that is ready for use."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model
        # By name, because its module has another path before sentence-transformers 6.
        self.is_static = type(model[0]).__name__ == "StaticEmbedding"
        # If a model also takes images, sounds or films, the library fetches a text that is an address, and opens one
        # that is a path. A text that is named as one is neither fetched nor opened. Before 5.4 there are no such models
        # and no names.
        known = tuple(getattr(model, "modalities", ["text"]))
        self._names_texts = set(known) != {"text"}
        self.modalities = tuple(modality for modality in ("text", *MEDIA) if modality in known)
        if self.is_static:
            self.slice_characters = _STATIC_CHARACTERS
        else:
            self.slice_characters = _CPU_CHARACTERS if model.device.type == "cpu" else _ACCELERATOR_CHARACTERS

    def forward(self, texts: Sequence[ModelInput]) -> NDArray[np.float32]:
        """Return float32 rows of shape (len(texts), dimensions), not normalised.

        Raises InputRejected for a file that cannot be decoded.
        """
        import numpy as np

        # The empty prompt overrides a default prompt of the model's own config, because the client adds the prefixes.
        inputs = list(map(self._named, texts)) if self._names_texts else list(texts)
        rows = self.model.encode(inputs, prompt="", batch_size=len(texts), show_progress_bar=False)
        return np.asarray(rows, dtype="<f4")

    def _named(self, given: ModelInput) -> dict[str, object]:
        """Return an input under the name of its modality, decoded."""
        if isinstance(given, str):
            return {"text": given}
        if given.modality == "image":
            from embedline.media.images import picture

            return {"image": picture(given)}
        from embedline.media.audio import samples

        return {"audio": {"array": samples(given, self._rate), "sampling_rate": self._rate}}

    @functools.cached_property
    def _rate(self) -> int:
        """The samples a second that the model hears."""
        processor = self.model[0].processor
        extractor = getattr(processor, "feature_extractor", processor)
        return int(extractor.sampling_rate)

    def free_memory(self) -> None:
        """Free the memory of a failed pass."""
        import torch

        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def max_tokens(self) -> int | None:
        """Return the longest text in tokens, without special tokens; None without a limit."""
        longest = self.model.max_seq_length
        if self.is_static or longest is None or math.isinf(longest):
            return None
        return int(longest) - int(self.model.tokenizer.num_special_tokens_to_add(pair=False))

    def tokenizer(self) -> Tokenizer | None:
        """Return a copy of the tokenizer, None if it is not of the tokenizers library."""
        from tokenizers import Tokenizer

        own = self.model.tokenizer
        fast = own if isinstance(own, Tokenizer) else getattr(own, "backend_tokenizer", None)
        return Tokenizer.from_str(fast.to_str()) if isinstance(fast, Tokenizer) else None


def is_on_cuda(settings: HostSettings) -> bool:
    """Return True if the model will run on a CUDA device."""
    import torch

    return (settings.device or "cuda").startswith("cuda") and torch.cuda.is_available()


def load_torch(settings: HostSettings, **model_kwargs: object) -> TorchBackend:
    """Load the model; `model_kwargs` go to transformers.

    Raises the libraries' own errors, and ProviderMisconfigured.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    if (settings.device or "").startswith("cuda") and not is_on_cuda(settings):
        raise ProviderMisconfigured(
            f'cannot load model "{settings.model}": this machine offers torch no CUDA device',
            hint='Set "device" to "auto" or "cpu", or install a CUDA build of torch and its driver.',
        )
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = SentenceTransformer(
        settings.model,
        revision=settings.revision,
        backend="torch",
        device=settings.device,
        # The type is explicit, because the default is the type in which the weights were saved.
        model_kwargs={"dtype": "float32" if settings.precision == "auto" else settings.precision, **model_kwargs},
        trust_remote_code=False,
    )
    return TorchBackend(model)
