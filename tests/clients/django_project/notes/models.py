"""A table, and the routing view of the pipeline over it."""

from django.db import models

from embedline.client.integrations.django import PipelineModel


class Note(models.Model):
    title = models.TextField()
    body = models.TextField()
    lang = models.TextField(default="en")


class NoteChunk(PipelineModel):
    pipeline = "notes"
    note = models.ForeignKey(Note, models.DO_NOTHING, db_column="id", related_name="chunks")
    title = models.TextField()
    lang = models.TextField()

    class Meta(PipelineModel.Meta):
        db_table = "notes_embedding"
