"""Find the segments of images and recordings, in the model host only."""

from __future__ import annotations

import json
from collections.abc import Callable

from embedline.chunking import chunking_spec
from embedline.core.media import require_modality
from embedline.errors import InputRejected, InvalidParameter
from embedline.model_host.faults import is_out_of_memory
from embedline.model_host.protocol import Frame, ProtocolError, unpack_files


def find_segments(frame: Frame, on_progress: Callable[[], None]) -> bytes:
    """Return the answer to a request for segments.

    It is a JSON array with an entry for each file. An entry is an array of [start, end], or the reason why the file
    cannot be decoded. `on_progress` is called as often as a part of a file is done. Raises InputRejected for a request that
    makes no sense.
    """
    from embedline.media.audio import segments as segments_of_recording
    from embedline.media.images import segments as segments_of_image

    try:
        files = unpack_files(frame.header.get("lengths"), frame.payload)
        modality, chunking = require_modality(str(frame.header.get("modality"))), frame.header["chunking"]
        spec = chunking_spec(chunking["method"], None, None, chunking["options"], modality)
    except (KeyError, TypeError, ProtocolError, InvalidParameter) as error:
        raise InputRejected("the request for segments makes no sense", detail=str(error)) from error
    found: list[list[tuple[int, int]] | str] = []
    for file in files:
        try:
            if modality == "image":
                found.append(segments_of_image(file, spec))
            else:
                found.append(segments_of_recording(file, spec, on_progress))
        except InputRejected as error:
            found.append(error.message)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found.append("the decoded file does not fit in the model host's memory")
        on_progress()
    return json.dumps(found).encode()
