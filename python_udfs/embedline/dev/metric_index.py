"""Write docs/reference/metrics.md: the names of all metrics, spans and attributes.

`make golden` runs it, and a test compares the page with the tables of names.
"""

from __future__ import annotations

from pathlib import Path

from embedline.observe.metric_names import METRICS, PREFIX

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reference" / "metrics.md"
_HEAD = """\
# Metrics

The metrics of `embedline.metrics()`, in its order; [Monitor with Prometheus](../how-to/monitor-with-prometheus.md) sets them up.
`make golden` writes this page.

- Times are in seconds, sizes in bytes, shares from 0 to 1.
- A counter counts all batches ever, also those that `embedline.batch` no longer has.
  It falls only when its pipeline is dropped or its database restored, which Prometheus takes for a reset.
- Labels are names of pipelines, models, indexes and alerts, and numbers of versions: no key, no text, no tenant.
- A metric without a value has no line, such as `ef_search` of a version without an index.

| metric | type | labels | meaning |
|---|---|---|---|
"""


def render() -> str:
    """Return the text of the page."""
    rows = [
        f"| `{PREFIX}{metric.name}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels)} | {metric.help} |"
        for metric in METRICS
    ]
    return _HEAD + "\n".join([*rows, ""])


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
