"""Find the version that a pipeline's routing view shows now."""

from __future__ import annotations

import re

from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.errors import NotFound
from embedline.postgres.session import Session

# Found by its name, which a dump and pg_upgrade keep. Read from the catalogue, because the caller may not name its
# schema's objects.
_SERVING_FUNCTION = """
    SELECT pg_get_functiondef(oid) FROM pg_proc
    WHERE proname = $1 AND pronamespace = 'embedline_data'::regnamespace
"""


def serving_number(session: Session, pipeline: Pipeline) -> int:
    """Return the number of the version that the routing view shows now.

    The function behind the view is read, because the catalogue is of the statement's snapshot and the view may be
    newer. Raises NotFound if the function is gone or changed.
    """
    function = f"{pipeline.generated('serving')}()"
    body = session.scalar(_SERVING_FUNCTION, ["text"], names.generated(pipeline.name, "serving"))
    found = re.search(r"SELECT (\d+)", body or "")
    if found is None:
        raise NotFound(
            f"the function {function}, which names the serving version, is gone or changed",
            hint=f"SELECT embedline.refresh_pipeline('{pipeline.name}') recreates it.",
        )
    return int(found[1])
