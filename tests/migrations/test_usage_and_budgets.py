"""Revision 0003 there and back: nothing of it stays, and create_model has one signature on either side."""

from __future__ import annotations

import psycopg
from alembic import command

from support import alembic_config, create_pages, create_pipeline, scalar

_OLD_CREATE_MODEL = """
    CREATE FUNCTION embedline.create_model(
        name text, provider text, model text, dimensions integer DEFAULT NULL, base_url text DEFAULT NULL,
        api_key_env text DEFAULT NULL, revision text DEFAULT NULL, document_prefix text DEFAULT '',
        query_prefix text DEFAULT '', max_batch_items integer DEFAULT 2048, max_batch_tokens integer DEFAULT 300000,
        concurrency integer DEFAULT 8, timeout_seconds double precision DEFAULT 60, options jsonb DEFAULT '{}')
    RETURNS text LANGUAGE sql RETURN 'old'
"""
_SIGNATURES = "SELECT array_agg(oid::regprocedure::text) FROM pg_proc WHERE proname = 'create_model'"
_LEFT = """
    SELECT count(*) FROM pg_class WHERE relnamespace = 'embedline'::regnamespace AND relname ~
        '^(reservation|usage|usage_day|spending_cap|budget|budget_stop|rate_limit|model_rate)'
"""
_FUNCTIONS = """
    SELECT count(*) FROM pg_proc WHERE pronamespace = 'embedline'::regnamespace AND proname IN ('set_budget', 'drop_budget',
        'set_price', 'set_rate_limit', 'estimate', '_roll_up_usage', '_work_done', '_measured_rates', '_note_rate')
"""


def test_down_and_up_again_with_spending_in_it(database_dsn: str, database: psycopg.Connection) -> None:
    create_pages(database, 3)
    create_pipeline(database)
    database.execute("SELECT embedline.set_price('static-256', 1)")
    database.execute("SELECT embedline.set_budget('day', pipeline => 'page', tokens => 5, money => 1)")
    database.execute("SELECT embedline.set_rate_limit('static-256', 5)")
    assert scalar(database, _FUNCTIONS) == 9
    command.downgrade(alembic_config(database_dsn), "0002")
    assert scalar(database, _LEFT) == 0
    assert scalar(database, _FUNCTIONS) == 0
    assert scalar(database, _SIGNATURES) is None
    # What an older package replays.
    database.execute(_OLD_CREATE_MODEL)
    command.upgrade(alembic_config(database_dsn), "head")
    (signature,) = scalar(database, _SIGNATURES)
    assert signature.endswith("jsonb,numeric,text)")
    assert scalar(database, "SELECT count(*) FROM embedline.budget") == 0
    assert scalar(database, "SELECT count(*) FROM embedline.model WHERE price_per_million_tokens IS NULL") == 2
