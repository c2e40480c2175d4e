"""Refuse vectors of other towers than those of the stored vectors."""

from __future__ import annotations

from embedline.catalog.values import Model
from embedline.core.embedding import EmbeddingBlock
from embedline.errors import ProviderMisconfigured


def space_fault(model: Model, block: EmbeddingBlock) -> ProviderMisconfigured | None:
    """Return the error of an answer whose model is another than the registered one.

    Only models of towers say what they are: the files of one tower may have been replaced, and vectors of two spaces
    would be compared.
    """
    known = (None, model.fingerprint, model.probed_fingerprint)
    if not model.has_towers or block.fingerprint in known:
        return None
    return ProviderMisconfigured(
        f'the files of model "{model.config.name}" are not those that it was registered with',
        detail="Its towers belong together with the stored vectors.",
        hint="Put the files back, or register them as another model and add a version:"
        " SELECT embedline.add_embedding_version('PIPELINE', 'MODEL');",
    )
