"""The command line `embedline`: a module for each subject, assembled here.

A module takes `app` from `embedline.client.cli.application`, decorates its functions with `@app.command`, and has one line below.
The entry point of the script is `app`.
"""

from __future__ import annotations

from embedline.client.cli import adopt as adopt
from embedline.client.cli import alerts as alerts
from embedline.client.cli import build_index as build_index
from embedline.client.cli import doctor as doctor
from embedline.client.cli import estimate as estimate
from embedline.client.cli import evaluate as evaluate
from embedline.client.cli import export as export
from embedline.client.cli import export_onnx as export_onnx
from embedline.client.cli import finetune as finetune
from embedline.client.cli import import_vectors as import_vectors
from embedline.client.cli import mcp as mcp
from embedline.client.cli import metrics as metrics
from embedline.client.cli import migrate as migrate
from embedline.client.cli import ray_backfill as ray_backfill
from embedline.client.cli import remote_worker as remote_worker
from embedline.client.cli import report as report
from embedline.client.cli import requeue as requeue
from embedline.client.cli import search as search
from embedline.client.cli import status as status
from embedline.client.cli import upgrade_model as upgrade_model
from embedline.client.cli import verify as verify
from embedline.client.cli import watch as watch
from embedline.client.cli import worker as worker
from embedline.client.cli.application import app as app
