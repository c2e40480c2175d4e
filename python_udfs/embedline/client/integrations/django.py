"""Bring pipelines to Django: a read-only model, search, migration operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

from django.db import connections, models
from django.db.migrations.operations.base import Operation, OperationCategory
from django.db.models.expressions import Func, RawSQL

from embedline.client.integrations.read_only import ReadOnlyView
from embedline.client.integrations.search_call import search_call
from embedline.client.migrations.statements import Cast, call

__all__ = ["AlterPipeline", "CreatePipeline", "PipelineModel", "PipelineQuerySet", "VectorField", "search"]

_OPERATORS = {"cosine": "<=>", "inner_product": "<#>", "l2": "<->"}


class VectorField(models.Field):
    """A pipeline's vector; in Python it is PostgreSQL's text of it."""

    def __init__(self, *args: Any, column_type: str = "vector", **kwargs: Any) -> None:
        """Take `vector` or `halfvec`, as the pipeline has it."""
        self.column_type = column_type
        super().__init__(*args, editable=False, **kwargs)

    def deconstruct(self) -> Any:
        """Return what makes the field again."""
        name, path, args, kwargs = super().deconstruct()
        kwargs.pop("editable", None)
        return name, path, args, {**kwargs, "column_type": self.column_type}

    def db_type(self, connection: Any) -> str:
        """Return the type's name in SQL."""
        return self.column_type


class PipelineQuerySet(models.QuerySet):
    """Queries of a routing view. Vectors are loaded only when they are read."""

    def nearest(self, query: str, name: str = "distance") -> Any:
        """Order by the distance to a text, nearest first, and annotate it.

        The text's vector is a scalar subquery, so the index over the vectors is used.
        """
        model: Any = self.model
        vector = RawSQL("SELECT embedline.embed_query(%s, %s)", (model.pipeline, query))
        column = model._meta.get_field("embedding")
        cast = "" if column.column_type == "vector" else f"::{column.column_type}"
        distance = Func(
            models.F("embedding"),
            Func(vector, template=f"%(expressions)s{cast}"),
            template="(%(expressions)s)",
            arg_joiner=f" {_OPERATORS[model.distance_of_pipeline]} ",
            output_field=models.FloatField(),
        )
        return self.annotate(**{name: distance}).order_by(name)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ReadOnlyView(f"{self.model._meta.db_table} is read only: write to the source table")

    create = bulk_create = bulk_update = update = delete = get_or_create = update_or_create = _refuse


class _Manager(models.Manager.from_queryset(PipelineQuerySet)):  # type: ignore[misc]
    def get_queryset(self) -> Any:
        return super().get_queryset().defer("embedding")


class PipelineModel(models.Model):
    """The base of a routing view's model.

    The model names the view (`Meta.db_table`), the pipeline (`pipeline`) and the columns of the source that it wants.
    """

    pipeline: ClassVar[str]
    distance_of_pipeline: ClassVar[str] = "cosine"

    chunk_id = models.BigIntegerField(primary_key=True)
    chunk_seq = models.IntegerField()
    chunk_start = models.IntegerField()
    chunk_end = models.IntegerField()
    chunk = models.TextField()
    embedding = VectorField()

    objects = _Manager()

    class Meta:
        abstract = True
        managed = False

    def save(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse."""
        raise ReadOnlyView(f"{self._meta.db_table} is read only: write to the source table")

    def delete(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse."""
        self.save()


def search(pipeline: str, query: str, k: int = 10, *, using: str = "default", **options: Any) -> list[dict[str, Any]]:
    """Return the rows of `embedline.search` as dictionaries.

    `options` are its further arguments. Raises TypeError for one that it has not.
    """
    with connections[using].cursor() as cursor:
        parameters = {"pipeline": pipeline, "query": query, "k": k, **options}
        cursor.execute(f"SELECT * FROM {search_call(options)}", parameters)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


class _PipelineOperation(Operation):
    reduces_to_sql = True
    name: str

    def state_forwards(self, app_label: str, state: Any) -> None:
        """Leave the models' state alone: a pipeline is none of Django's."""

    def _run(self, app_label: str, schema_editor: Any, statement: str) -> None:
        from django.db import router

        if router.allow_migrate(schema_editor.connection.alias, app_label):
            schema_editor.execute(statement, params=None)


class CreatePipeline(_PipelineOperation):
    """Create a pipeline; undone, it is dropped with its vectors.

    `options` are further arguments of `embedline.create_pipeline`. The source is a table by its name in SQL.
    """

    category = OperationCategory.ADDITION

    def __init__(
        self, name: str, source: str, content: str, model: str, options: Mapping[str, Any] | None = None
    ) -> None:
        """Take what `embedline.create_pipeline` takes."""
        # Each by a name of its own, because Django writes no others when it squashes migrations.
        self.name, self.source, self.content, self.model = name, source, content, model
        self.options = options

    def database_forwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        """Create the pipeline in the transaction of the migration."""
        arguments = {
            "name": self.name,
            "source": Cast(self.source, "regclass"),
            "content": self.content,
            "model": self.model,
            **(self.options or {}),
        }
        self._run(app_label, schema_editor, call("create_pipeline", arguments))

    def database_backwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        """Drop the pipeline."""
        self._run(app_label, schema_editor, call("drop_pipeline", {"name": self.name}))

    def describe(self) -> str:
        """Return what the migration prints."""
        return f"Create pipeline {self.name} on {self.source}"

    @property
    def migration_name_fragment(self) -> str:
        """Return the part of a migration's name."""
        return f"pipeline_{self.name}"


class AlterPipeline(_PipelineOperation):
    """Change a pipeline's recipe, while it is in use.

    `after` has arguments of `embedline.alter_pipeline`; None removes an optional expression. `before` has what they
    were. Without it the operation cannot be undone.
    """

    category = OperationCategory.ALTERATION

    def __init__(self, name: str, after: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> None:
        """Take the changed arguments and what they were."""
        if before is not None and set(before) != set(after):
            raise ValueError(f"AlterPipeline({name!r}): before and after name different arguments")
        self.name, self.after, self.before = name, after, before

    @property
    def reversible(self) -> bool:
        """Return True if the operation knows what was before."""
        return self.before is not None

    def database_forwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        """Change the recipe; workers embed the affected rows again."""
        self._run(app_label, schema_editor, _altered(self.name, self.after))

    def database_backwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        """Restore the recipe."""
        self._run(app_label, schema_editor, _altered(self.name, self.before or {}))

    def describe(self) -> str:
        """Return what the migration prints."""
        return f"Alter {', '.join(self.after)} of pipeline {self.name}"

    @property
    def migration_name_fragment(self) -> str:
        """Return the part of a migration's name."""
        return f"pipeline_{self.name}_{'_'.join(self.after)}"


def _altered(name: str, options: Mapping[str, Any]) -> str:
    given = {option: value for option, value in options.items() if value is not None}
    dropped = [option for option, value in options.items() if value is None]
    return call("alter_pipeline", {"name": name, **given, "drop": dropped or None})
