"""Which version a pipeline's routing view shows at this moment."""

from __future__ import annotations

import re

from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.errors import NotFound
from embedline.postgres.session import Session

# By its name, which a dump and pg_upgrade keep; in the catalogue, because whoever asks may not name what is in the schema.
_SERVING_FUNCTION = """
    SELECT pg_get_functiondef(oid) FROM pg_proc
    WHERE proname = $1 AND pronamespace = 'embedline_data'::regnamespace
"""


def serving_number(session: Session, pipeline: Pipeline) -> int:
    """Return the number of the version that the routing view shows at this moment.

    Raises NotFound where nothing says so: the catalogue is of the statement's snapshot, and the view may be of a later one.
    """
    function = f"{pipeline.generated('serving')}()"
    body = session.scalar(_SERVING_FUNCTION, ["text"], names.generated(pipeline.name, "serving"))
    found = re.search(r"SELECT (\d+)", body or "")
    if found is None:
        raise NotFound(
            f"the function {function} is gone or changed, which says what version serves",
            hint=f"SELECT embedline.refresh_pipeline('{pipeline.name}') makes it anew.",
        )
    return int(found[1])
