"""Measure bare `SentenceTransformer.encode`.

Usage: `bare.py MODEL SHORT LONG DEVICE RESULTS GO SECONDS`. It loads while the database is set up, waits for the file GO,
then measures. Each figure is one RESULT line.
"""

import os
import sys
import time
from pathlib import Path

START = time.time()
model_dir, short_path, long_path, device, results, go, seconds = sys.argv[1:8]
seconds = float(seconds)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("TOKENIZERS_PARALLELISM", None)


def result(name, value, unit, detail=""):
    shown = f"{value:.1f}" if isinstance(value, float) else value
    line = f"RESULT {name} {shown} {unit} {detail}".rstrip()
    print(line, flush=True)
    with open(results, "a") as file:
        file.write(line + "\n")


# After its environment, and timed.
import torch  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

imported = time.time() - START
short = Path(short_path).read_text(encoding="utf-8").splitlines()
pages = Path(long_path).read_text(encoding="utf-8").split("\f")
joined = "\n\n".join(pages)
step = max(1, (len(joined) - 1400) // 20000)
long = [joined[i : i + 1400] for i in range(0, len(joined) - 1400, step)][:20000]
small = device == "cpu"


def sync():
    if device.startswith("cuda"):
        torch.cuda.synchronize()


models = {}
for dtype in ("float16", "float32"):
    began = time.time()
    models[dtype] = SentenceTransformer(model_dir, device=device, model_kwargs={"dtype": dtype})
    models[dtype].encode(short[:8], show_progress_bar=False)
    sync()
    print(f"loaded {dtype} in {time.time() - began:.1f} s", flush=True)
ready = time.time() - START
result("bare_import_s", imported, "s", f"import of the libraries; both models ready after {ready:.1f} s")

while not os.path.exists(go) and time.time() - START < 240:
    time.sleep(0.05)


def measure(name, model, texts, batch, aim, detail=""):
    """Encode texts for about `aim` seconds, after a pass that tells how many those are."""
    n = min(len(texts), 2 * batch if not small else 32)
    model.encode(texts[:n], batch_size=batch, show_progress_bar=False)
    sync()
    began = time.perf_counter()
    model.encode(texts[:n], batch_size=batch, show_progress_bar=False)
    sync()
    per_text = (time.perf_counter() - began) / n
    count = int(min(len(texts), max(n, aim / per_text)))
    if not small:
        count = max(batch, count // batch * batch)
    began, cpu = time.perf_counter(), time.process_time()
    model.encode(texts[:count], batch_size=batch, show_progress_bar=False)
    sync()
    took, used = time.perf_counter() - began, time.process_time() - cpu
    result(
        name, count / took, "texts/s", f"{count} texts in {took:.2f} s, batch {batch}, {used / took:.1f} cores {detail}"
    )


end = time.time() + seconds
figures = [
    ("bare_f16_short_b1024", "float16", short, 1024, 3.0, None),
    ("bare_f32_short_b1024", "float32", short, 1024, 3.0, None),
    ("bare_f16_long_b256", "float16", long, 256, 2.0, None),
    ("bare_f32_long_b256", "float32", long, 256, 2.0, None),
    ("bare_f16_short_b256", "float16", short, 256, 2.5, None),
    ("bare_f16_short_b64", "float16", short, 64, 2.5, None),
    ("bare_f16_short_b1024_tokenizers_serial", "float16", short, 1024, 2.5, "false"),
    ("bare_f16_long_b1024", "float16", long, 1024, 2.0, None),
    ("bare_f16_long_b64", "float16", long, 64, 2.0, None),
    ("bare_f16_long_b256_tokenizers_serial", "float16", long, 256, 2.0, "false"),
    ("bare_f32_short_b256", "float32", short, 256, 2.5, None),
    ("bare_f32_short_b64", "float32", short, 64, 2.5, None),
    ("bare_f32_long_b64", "float32", long, 64, 2.0, None),
    ("bare_f32_long_b1024", "float32", long, 1024, 2.0, None),
    ("bare_f16_short_b4096", "float16", short, 4096, 2.0, None),
]
for name, dtype, texts, batch, aim, parallelism in figures:
    if time.time() > end:
        print(f"no time for {name}", flush=True)
        continue
    try:
        if parallelism is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism
        detail = f"mean {sum(map(len, texts)) / len(texts):.0f} characters"
        measure(name, models[dtype], texts, batch, 0.5 if small else aim, detail)
    except Exception as error:
        result(name, "failed", "-", repr(error)[:200])
os.environ.pop("TOKENIZERS_PARALLELISM", None)

os._exit(0)
