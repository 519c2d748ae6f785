"""A recorder for the tests, numpy only: pseudo-random logits that depend on sample and view. Run as `python record_script.py URL VIEWS PAUSE`."""

import sys
import time

import numpy as np

from limbeck.records import Field, Part, RecordWriter, codec_from

CODEC = {"name": "topk", "k": 3}
IDENTITY = {
    "teacher": {"name": "net", "weights": "a" * 64},
    "data": {"name": "images", "content": "b" * 64},
    "views": {"kind": "boxes", "seed": 0, "scale": [0.08, 1.0]},
    "tokenizer": None,
    "codec": CODEC,
}


def parts(views=3, samples=50, codec=CODEC, classes=20):
    kept = codec_from(codec)
    fields = (Field.logits(kept, classes, 2), Field.features("pool", (3, 2)), Field.score("loss"), Field.boxes(), Field.flip())
    return {"train": Part(np.arange(samples) * 3 + 1, views, fields), "test": Part(np.arange(7) + 10**12, 1, fields[:1])}


def values(fields, ids, view):
    """What the "teacher" says of these samples in this view."""
    rows = [np.random.default_rng([int(number), view]) for number in ids]
    found = {}
    for field in fields:
        if field.name == "flip":
            found[field.name] = np.array([row.integers(2) for row in rows], np.uint8)
        else:
            found[field.name] = np.stack([row.normal(size=field.shape).astype(np.float32) * 3 for row in rows])
    return found


def writer(url, *, views=3, rank=0, world=1, **changes):
    arguments = {"identity": IDENTITY, "about": {"made_by": "tests"}, "parts": parts(views), "shard_rows": 16} | changes
    return RecordWriter(url, rank=rank, world=world, **arguments)


def work(one, pause=0.0):
    for task in one.pending():
        one.write(task, values(one.parts[task.part].fields, task.ids, task.view))
        time.sleep(pause)


def record(url, **changes):
    one = writer(url, **changes)
    work(one)
    one.finish()


if __name__ == "__main__":
    one = writer(sys.argv[1], views=int(sys.argv[2]))
    print("open", flush=True)
    work(one, float(sys.argv[3]))
    one.finish()
    assert "torch" not in sys.modules
