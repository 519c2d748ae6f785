"""Training from a record costs little memory, and no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

RECORD = """
import sys
import numpy as np
from limbeck.records import Field, Part, RecordWriter, codec_from
part = Part(np.arange(100_000), 1, (Field.logits(codec_from({"name": "topk", "k": 10}), 1000),))
writer = RecordWriter(sys.argv[1], identity={}, about={}, parts={"train": part}, shard_rows=4096)
rows = np.random.default_rng(0).normal(size=(4096, 1, 1000)).astype(np.float32)
for task in writer.pending():
    writer.write(task, {"logits": rows[: len(task.ids)]})
writer.finish()
"""

READ = """
import sys
from pathlib import Path
import numpy as np
from limbeck.records import Record
part = Record.open(sys.argv[1]).parts["train"]
order = np.random.default_rng(1).permutation(100_000)
total = 0
for start in range(0, 100_000, 256):
    ids = order[start : start + 256]
    total += len(part.read(["logits"], ids, np.zeros(len(ids), np.int64))["logits"])
assert total == 100_000
assert "torch" not in sys.modules
# not ru_maxrss: a child inherits its parent's through fork and exec
print(next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's largest resident memory")
def test_a_hundred_thousand_rows_in_random_order_stay_under_200_mib(tmp_path):
    subprocess.run([sys.executable, "-c", RECORD, str(tmp_path / "r")], check=True)
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path / "r")], check=True, capture_output=True, text=True)
    print(f"largest resident memory: {float(done.stdout):.0f} MiB")
    assert float(done.stdout) < 200
