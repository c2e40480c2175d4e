"""Add the ledger of usage, budgets and rate limits.

What: a price on each model; tables reservation (one row for each batch that is sent), usage_day (the same, rolled up),
spending_cap, budget_stop, rate_limit and model_rate; the old signature of create_model, which has no price, goes.
Lock: ACCESS EXCLUSIVE on embedline.model for an instant (a column without a default is no rewrite); none on any table of
the user. How long: milliseconds. Undo: `alembic downgrade 0002` drops all of it, the record of what was spent included.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

UPGRADE: tuple[str, ...] = (
    """
    ALTER TABLE embedline.model ADD COLUMN price_per_million_tokens numeric
        CONSTRAINT model_price_per_million_tokens_check CHECK (price_per_million_tokens >= 0)
    """,
    "COMMENT ON COLUMN embedline.model.price_per_million_tokens IS 'What the provider takes for a million tokens, in the one currency of all prices and budgets of this database; NULL: not known'",
    # No foreign keys: each insert would lock the rows of its model and pipeline, and accounts outlive what they account for.
    """
    CREATE TABLE embedline.reservation (
        reservation_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT reservation_pkey PRIMARY KEY,
        model_id bigint NOT NULL,
        pipeline_id bigint NOT NULL,
        worker_id integer,
        reserved_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        settled_at timestamptz,
        requests integer NOT NULL,
        tokens bigint NOT NULL,
        price numeric
    ) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
        autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 2000)
    """,
    "CREATE INDEX reservation_reserved_at_idx ON embedline.reservation (reserved_at)",
    "COMMENT ON TABLE embedline.reservation IS 'Provider requests that were paid for lately: written before they are sent, corrected after the answers; see embedline.usage'",
    "COMMENT ON COLUMN embedline.reservation.worker_id IS 'Resident worker that reserved; NULL: embed_pending'",
    "COMMENT ON COLUMN embedline.reservation.settled_at IS 'When the answers came; NULL: in flight, or the worker died and the estimate stays'",
    "COMMENT ON COLUMN embedline.reservation.tokens IS 'The estimate until settled_at, then what the provider counted'",
    "COMMENT ON COLUMN embedline.reservation.price IS 'The model''s price for a million tokens when the requests were sent'",
    """
    CREATE TABLE embedline.usage_day (
        day date NOT NULL,
        model_id bigint NOT NULL,
        pipeline_id bigint NOT NULL,
        requests bigint NOT NULL,
        tokens bigint NOT NULL,
        money numeric NOT NULL,
        busy_seconds double precision NOT NULL,
        CONSTRAINT usage_day_pkey PRIMARY KEY (day, model_id, pipeline_id)
    ) WITH (fillfactor = 50)
    """,
    "COMMENT ON TABLE embedline.usage_day IS 'Reservations of before the last minutes, summed up by day (UTC), model and pipeline; see embedline.usage'",
    "COMMENT ON COLUMN embedline.usage_day.busy_seconds IS 'Time during which at least one request was under way: tokens / busy_seconds is the measured rate'",
    """
    CREATE TABLE embedline.spending_cap (
        spending_cap_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT spending_cap_pkey PRIMARY KEY,
        pipeline_id bigint CONSTRAINT spending_cap_pipeline_id_fkey REFERENCES embedline.pipeline ON DELETE CASCADE,
        model_id bigint CONSTRAINT spending_cap_model_id_fkey REFERENCES embedline.model ON DELETE CASCADE,
        period text NOT NULL CONSTRAINT spending_cap_period_check CHECK (period IN ('day', 'month')),
        unit text NOT NULL CONSTRAINT spending_cap_unit_check CHECK (unit IN ('tokens', 'money')),
        amount numeric NOT NULL CONSTRAINT spending_cap_amount_check CHECK (amount >= 0),
        set_by text NOT NULL,
        set_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT spending_cap_scope_check CHECK (num_nonnulls(pipeline_id, model_id) = 1),
        CONSTRAINT spending_cap_scope_period_unit_key UNIQUE NULLS NOT DISTINCT (pipeline_id, model_id, period, unit)
    )
    """,
    "COMMENT ON TABLE embedline.spending_cap IS 'What pipelines and models may spend in a day or month (UTC); see embedline.set_budget and embedline.budget'",
    """
    CREATE TABLE embedline.budget_stop (
        pipeline_id bigint CONSTRAINT budget_stop_pkey PRIMARY KEY
            CONSTRAINT budget_stop_pipeline_id_fkey REFERENCES embedline.pipeline ON DELETE CASCADE,
        tokens bigint NOT NULL,
        stopped_at timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    "COMMENT ON TABLE embedline.budget_stop IS 'The request that last no longer fitted into a pipeline''s budgets: the pipeline rests until so much is left again'",
    """
    CREATE TABLE embedline.rate_limit (
        model_id bigint CONSTRAINT rate_limit_pkey PRIMARY KEY
            CONSTRAINT rate_limit_model_id_fkey REFERENCES embedline.model ON DELETE CASCADE,
        requests_per_minute integer CONSTRAINT rate_limit_requests_per_minute_check CHECK (requests_per_minute > 0),
        tokens_per_minute bigint CONSTRAINT rate_limit_tokens_per_minute_check CHECK (tokens_per_minute > 0),
        CONSTRAINT rate_limit_limit_check CHECK (num_nonnulls(requests_per_minute, tokens_per_minute) >= 1)
    )
    """,
    "COMMENT ON TABLE embedline.rate_limit IS 'What all workers together may send to a model in a minute; see embedline.set_rate_limit'",
    """
    CREATE TABLE embedline.model_rate (
        model_id bigint CONSTRAINT model_rate_pkey PRIMARY KEY
            CONSTRAINT model_rate_model_id_fkey REFERENCES embedline.model ON DELETE CASCADE,
        tokens_per_second double precision NOT NULL
            CONSTRAINT model_rate_tokens_per_second_check CHECK (tokens_per_second > 0),
        measured_at timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    "COMMENT ON TABLE embedline.model_rate IS 'How fast embedline.estimate found a model of this machine to be'",
    # Replayed with a price as one more parameter; beside it the old one would make every call ambiguous.
    """
    -- squawk-ignore ban-drop-function
    DROP FUNCTION IF EXISTS embedline.create_model(
        text, text, text, integer, text, text, text, text, text, integer, integer, integer, double precision, jsonb
    )
    """,
)
DOWNGRADE: tuple[str, ...] = (
    """
    DROP FUNCTION IF EXISTS embedline.create_model(
        text, text, text, integer, text, text, text, text, text, integer, integer, integer, double precision, jsonb, numeric
    )
    """,
    # Replayed objects that nothing of an older version would replace. Views of others that read them are replayed too.
    """
    DROP FUNCTION IF EXISTS embedline.set_budget(text, text, text, bigint, numeric),
        embedline.drop_budget(text, text, text), embedline.set_price(text, numeric),
        embedline.set_rate_limit(text, integer, bigint), embedline.estimate(text, text, text, integer, text),
        embedline._roll_up_usage(), embedline._work_done(text),
        embedline._measured_rates(), embedline._note_rate(text, double precision)
    """,
    "DROP VIEW IF EXISTS embedline.budget, embedline.usage CASCADE",
    """
    DROP TABLE embedline.model_rate, embedline.rate_limit, embedline.budget_stop, embedline.spending_cap,
        embedline.usage_day, embedline.reservation
    """,
    "ALTER TABLE embedline.model DROP COLUMN price_per_million_tokens",
)


def _run(statements: tuple[str, ...]) -> None:
    for statement in statements:
        if op.get_context().as_sql:
            op.get_context().impl.static_output(statement + ";")
        else:
            # Plain execution would take ":name" and "%" in the statement for parameters.
            op.get_bind().exec_driver_sql(statement, execution_options={"no_parameters": True})


def upgrade() -> None:
    _run(UPGRADE)


def downgrade() -> None:
    _run(DOWNGRADE)
