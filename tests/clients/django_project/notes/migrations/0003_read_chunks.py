"""The model of the routing view, as makemigrations writes it."""

from django.db import migrations, models

import embedline.client.integrations.django


class Migration(migrations.Migration):
    dependencies = [
        ("notes", "0002_pipeline"),
    ]

    operations = [
        migrations.CreateModel(
            name="NoteChunk",
            fields=[
                ("chunk_id", models.BigIntegerField(primary_key=True, serialize=False)),
                ("chunk_seq", models.IntegerField()),
                ("chunk_start", models.IntegerField()),
                ("chunk_end", models.IntegerField()),
                ("chunk", models.TextField()),
                ("embedding", embedline.client.integrations.django.VectorField(column_type="vector")),
                ("title", models.TextField()),
                ("lang", models.TextField()),
            ],
            options={
                "db_table": "notes_embedding",
                "abstract": False,
                "managed": False,
            },
        ),
    ]
