"""Signs that the server is behind, at which workers take less on.

Replicas lag, or an old snapshot blocks vacuum.
"""

from __future__ import annotations

from embedline.catalog.settings import Settings
from embedline.postgres.session import Session


def held_back_by(session: Session, settings: Settings) -> str | None:
    """Return what passes its limit now, in words for embedline.status.

    None where nothing does.
    """
    row = session.query(
        """
        SELECT (SELECT extract(epoch FROM max(replay_lag))::double precision FROM pg_stat_replication) AS lag_seconds,
            greatest(
                (SELECT max(age(backend_xmin)) FROM pg_stat_activity WHERE backend_xmin IS NOT NULL),
                (SELECT max(age(transaction)) FROM pg_prepared_xacts),
                (SELECT max(age(xmin)) FROM pg_replication_slots WHERE xmin IS NOT NULL)) AS xmin_age
        """
    )[0]
    lag, age = row["lag_seconds"], row["xmin_age"]
    if lag is not None and lag > settings.max_replication_lag_seconds:
        return f"a replica is {lag:.0f} s behind, over max_replication_lag_seconds"
    if age is not None and age > settings.max_xmin_age:
        return f"the oldest snapshot is {age} transactions old, over max_xmin_age"
    return None
