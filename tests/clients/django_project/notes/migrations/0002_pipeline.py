"""The pipeline, and a change of it."""

from django.db import migrations

from embedline.client.integrations.django import AlterPipeline, CreatePipeline


class Migration(migrations.Migration):
    dependencies = [("notes", "0001_initial")]
    operations = [
        CreatePipeline(
            "notes", "notes_note", "title || ' 100%% ' || body", "static-256", {"chunk_tokens": 64, "keyword": "simple"}
        ),
        AlterPipeline(
            "notes",
            {"content": "title || ' ' || body", "filter": "lang <> 'xx'"},
            before={"content": "title || ' 100%% ' || body", "filter": None},
        ),
    ]
