"""Run by Django's own runner, from tests/clients/test_django.py."""

import io

from django.core.management import call_command
from django.db import connection
from django.db.migrations.exceptions import IrreversibleError
from django.db.migrations.executor import MigrationExecutor
from django.db.migrations.writer import OperationWriter
from django.test import TestCase, TransactionTestCase

from embedline.client.integrations.django import AlterPipeline, CreatePipeline, VectorField, search
from embedline.client.integrations.read_only import ReadOnlyView
from notes.models import Note, NoteChunk


def _embed() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT embedline.embed_pending(1000)")


def _recipe() -> tuple | None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT content_expression, filter_expression FROM embedline.pipeline WHERE name = 'notes'")
        return cursor.fetchone()


class SearchTests(TestCase):
    @classmethod
    def setUpTestData(cls):
        Note.objects.create(title="Bread", body="Knead the dough and bake it.")
        Note.objects.create(title="Brot", body="Den Teig kneten und backen.", lang="de")
        Note.objects.create(title="Hidden", body="Bread that the filter leaves out.", lang="xx")
        for number in range(20):
            Note.objects.create(title=f"Rocket {number}", body="It reached its orbit.")
        _embed()

    def test_the_nearest_chunks_come_with_their_rows(self):
        nearest = NoteChunk.objects.filter(lang="en").select_related("note").nearest("how do I bake bread?")
        with self.assertNumQueries(1):
            first, second = nearest[:2]
            self.assertEqual((first.title, first.note.body), ("Bread", "Knead the dough and bake it."))
        self.assertLess(first.distance, second.distance)
        self.assertIn("embedding", first.get_deferred_fields())
        self.assertTrue(first.embedding.startswith("["))
        self.assertEqual(first.note.chunks.count(), 1)

    def test_nearest_uses_the_index(self):
        with connection.cursor() as cursor:
            cursor.execute("SELECT embedline.index_statement('notes')")
            # A test of Django runs in a transaction.
            cursor.execute(cursor.fetchone()[0].replace(" CONCURRENTLY", ""))
            cursor.execute("SET LOCAL enable_sort = off")
        plan = NoteChunk.objects.nearest("bread")[:3].explain()
        self.assertIn("notes_v1_embedding_idx", plan)
        self.assertNotIn("Sort", plan)

    def test_search_returns_rows_and_takes_options(self):
        (found,) = search("notes", "'); DROP TABLE notes_note; -- %s bread", k=1, per_document=True, tenant=None)
        self.assertEqual(Note.objects.get(id=found["key"]).title, "Bread")
        self.assertEqual(Note.objects.count(), 23)
        with self.assertRaisesMessage(TypeError, "has no argument drop"):
            search("notes", "bread", drop=True)

    def test_search_ranks_by_words_and_filters(self):
        found = search("notes", "bread", mode="keyword", filter="title = 'Bread'")
        self.assertEqual([(row["semantic_rank"], row["keyword_rank"]) for row in found], [(None, 1)])
        self.assertEqual(search("notes", "zebra", mode="keyword"), [])

    def test_the_model_is_read_only(self):
        chunk = NoteChunk.objects.first()
        for write in (
            chunk.save,
            chunk.delete,
            NoteChunk.objects.all().delete,
            lambda: NoteChunk.objects.update(title="x"),
            lambda: NoteChunk.objects.create(chunk_id=1),
            lambda: NoteChunk.objects.bulk_create([chunk]),
        ):
            with self.assertRaisesMessage(ReadOnlyView, "notes_embedding is read only"):
                write()


class MigrationTests(TransactionTestCase):
    def test_migrations_are_undone_and_done_again(self):
        self.assertEqual(_recipe(), ("title || ' ' || body", "lang <> 'xx'"))
        MigrationExecutor(connection).migrate([("notes", "0001_initial")])
        self.assertIsNone(_recipe())
        MigrationExecutor(connection).migrate([("notes", "0003_read_chunks")])
        self.assertEqual(_recipe(), ("title || ' ' || body", "lang <> 'xx'"))

    def test_an_alteration_restores_what_was_before(self):
        migration = MigrationExecutor(connection).loader.get_migration("notes", "0002_pipeline")
        with connection.schema_editor() as editor:
            migration.operations[1].database_backwards("notes", editor, None, None)
        self.assertEqual(_recipe(), ("title || ' 100%% ' || body", None))
        with connection.schema_editor() as editor:
            migration.operations[1].database_forwards("notes", editor, None, None)
        self.assertEqual(_recipe(), ("title || ' ' || body", "lang <> 'xx'"))

    def test_an_alteration_that_knows_no_before_cannot_be_undone(self):
        class Blind(type(MigrationExecutor(connection).loader.get_migration("notes", "0001_initial"))):
            operations = [AlterPipeline("notes", {"weight": 2.0})]

        executor = MigrationExecutor(connection)
        with self.assertRaises(IrreversibleError):
            Blind("0003_blind", "notes").unapply(executor.loader.project_state(), None)
        with self.assertRaisesMessage(ValueError, "before and after name different arguments"):
            AlterPipeline("notes", {"weight": 2.0}, before={"filter": None})

    def test_no_change_is_found_and_the_sql_is_shown(self):
        call_command("makemigrations", check=True, dry_run=True, verbosity=0)
        shown = io.StringIO()
        call_command("sqlmigrate", "notes", "0002", stdout=shown)
        self.assertIn(
            "SELECT embedline.create_pipeline(name => 'notes', source => 'notes_note'::regclass", shown.getvalue()
        )
        self.assertIn("drop", call_command("sqlmigrate", "notes", "0002", backwards=True, stdout=io.StringIO()))

    def test_operations_and_fields_are_written_into_migrations(self):
        written, imports = OperationWriter(
            CreatePipeline("a", "b", "c", "static-256", {"chunk_tokens": 64})
        ).serialize()
        self.assertIn("'chunk_tokens': 64", written)
        self.assertEqual(imports, {"import embedline.client.integrations.django"})
        _, path, _, arguments = VectorField(column_type="halfvec").deconstruct()
        self.assertEqual((path.rpartition(".")[2], arguments), ("VectorField", {"column_type": "halfvec"}))
