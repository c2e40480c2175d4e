"""Store and read which columns of its source each expression of a pipeline reads.

The catalogue holds attribute numbers, which a renamed column keeps. Expressions are known by the suffix of their function.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from embedline.catalog.values import Pipeline
from embedline.core.json_values import as_mapping
from embedline.pipelines.ddl.plan import CapturePlan, SourceExpression
from embedline.postgres.session import Session

# The parameter of each expression, by the suffix of its function.
PARAMETERS = {"content": "content", "filter": "filter", "prefix": "document_prefix", "tenant_value": "tenant"}
_STORE = """
    UPDATE embedline.pipeline AS p SET
        input_columns = (
            SELECT jsonb_object_agg(e.suffix, (
                SELECT coalesce(jsonb_agg(a.attnum ORDER BY k.position), '[]')
                FROM jsonb_array_elements_text(e.columns) WITH ORDINALITY AS k (name, position)
                JOIN pg_attribute AS a ON a.attrelid = p.source AND a.attname = k.name))
            FROM jsonb_each($2) AS e (suffix, columns)),
        input_attributes = (
            SELECT coalesce(array_agg(a.attnum ORDER BY k.position), '{}')
            FROM unnest($3::name[]) WITH ORDINALITY AS k (name, position)
            JOIN pg_attribute AS a ON a.attrelid = p.source AND a.attname = k.name)
    WHERE p.name = $1
"""
# Expressions that have lost a column are left out.
_IN_USE = """
    SELECT e.suffix, array_agg(a.attname::text ORDER BY k.position) FILTER (WHERE k.position IS NOT NULL) AS names,
        array_agg(format_type(a.atttypid, NULL) ORDER BY k.position) FILTER (WHERE k.position IS NOT NULL) AS types
    FROM embedline.pipeline AS p
    CROSS JOIN LATERAL jsonb_each(p.input_columns) AS e (suffix, columns)
    LEFT JOIN LATERAL jsonb_array_elements_text(e.columns) WITH ORDINALITY AS k (number, position) ON true
    LEFT JOIN pg_attribute AS a ON a.attrelid = p.source AND a.attnum = k.number::smallint AND NOT a.attisdropped
    WHERE p.name = $1
    GROUP BY e.suffix HAVING count(k.position) = count(a.attnum)
"""
# The parameters as the function was made: the names that the expression uses, and their types.
_ARGUMENTS = """
    SELECT w.suffix, coalesce(p.proargnames, '{}') AS names, ARRAY(
        SELECT format_type(t.type_oid, NULL) FROM unnest(p.proargtypes::oid[]) WITH ORDINALITY AS t (type_oid, position)
        ORDER BY t.position) AS types
    FROM unnest($2::text[]) WITH ORDINALITY AS w (suffix, position)
    JOIN pg_proc AS p ON p.proname = $1 || '_' || w.suffix AND p.pronamespace = 'embedline_expression'::regnamespace
    ORDER BY w.position
"""
_COLUMNS = """
    SELECT attname, attnum FROM pg_attribute WHERE attrelid = $1::oid AND attnum > 0 AND NOT attisdropped
"""
_STORED = "SELECT input_columns, source_columns FROM embedline.pipeline WHERE name = $1"


@dataclass(frozen=True)
class Input:
    """A column that an expression reads.

    It has its number and name in the source, and the name that the expression uses.
    """

    number: int | None
    name: str
    known_as: str
    type: str


def store_inputs(session: Session, plan: CapturePlan) -> None:
    """Note the columns that the expressions of a plan read."""
    expressions = plan.watched | ({"tenant_value": plan.tenant} if plan.tenant is not None else {})
    columns = {suffix: [name for name, _ in expression.columns] for suffix, expression in expressions.items()}
    watched = [name for name, _ in plan.expression_columns]
    session.query(_STORE, ["text", "jsonb", "text[]"], plan.name, json.dumps(columns), watched)


def expressions_in_use(session: Session, pipeline: Pipeline) -> dict[str, SourceExpression]:
    """Return the input columns of each expression, with their current names and types.

    The expressions are without text. Those that have lost a column are left out.
    """
    return {
        str(row["suffix"]): SourceExpression("", tuple(zip(row["names"] or (), row["types"] or (), strict=True)))
        for row in session.query(_IN_USE, ["text"], pipeline.name)
    }


def load_inputs(session: Session, pipeline: Pipeline) -> dict[str, tuple[Input, ...]]:
    """Return the columns that each expression reads, also those that are gone.

    A column that went with a CASCADE is known from the catalogue by its number and name. A pipeline whose functions had gone
    before their columns were stored knows them by the names of parameters.
    """
    stored = session.query(_STORED, ["text"], pipeline.name)[0]
    numbers = {suffix: list(columns) for suffix, columns in as_mapping(stored["input_columns"]).items()}
    known = {int(number): str(name) for number, name in as_mapping(stored["source_columns"]).items()}
    now = {int(row["attnum"]): str(row["attname"]) for row in session.query(_COLUMNS, ["bigint"], pipeline.source_oid)}
    by_name = {name: number for number, name in now.items()}
    found: dict[str, tuple[Input, ...]] = {}
    for row in session.query(_ARGUMENTS, ["text", "text[]"], pipeline.name, list(PARAMETERS)):
        parameters = list(zip(row["names"], row["types"], strict=True))
        places = numbers.get(row["suffix"]) or [None] * len(parameters)
        inputs = []
        for number, (known_as, kind) in zip(places, parameters, strict=True):
            name = known_as if number is None else now.get(number) or known.get(number, known_as)
            inputs.append(Input(by_name.get(name, number), name, known_as, kind))
        found[row["suffix"]] = tuple(inputs)
    return found
