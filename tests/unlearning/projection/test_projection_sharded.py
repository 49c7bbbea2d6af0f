"""Several processes: averaged rows and sharded sums give what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
sys.path.insert(0, {here!r})
import torch, torch.distributed as dist
import tiny_projection as tiny
from orthomerge.unlearning import RetainProjector
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
# The mean over the processes is what one process has.
RISE = {{1: [0.003, 0.003], 2: [0.002, 0.004]}}

def train(kind, granularity):
    world = 1 if kind == "single" else 2
    model = forward = tiny.TinyTransformer().double()
    settings = dict(row_dtype=torch.float64, history=2, refresh_every=2, granularity=granularity)
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
        settings["sharded"] = True
    if kind == "ddp":
        forward = torch.nn.parallel.DistributedDataParallel(model)
    if kind in ("ddp", "manual"):
        settings["process_group"] = dist.group.WORLD
    def mine(seed):
        rows = tiny.batch(seed, rows=8)
        return rows if world == 1 else rows.chunk(2)[rank]
    projector = RetainProjector(model, **settings)
    projector.set_bank([lambda s=s: [(tiny.nll(forward, mine(s)), 1.0)] for s in (20, 21)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=False)
    stats = []
    for step in range(4):
        for micro in range(2):
            loss = tiny.nll(forward, mine(40 + 2 * step + micro))
            start = loss.detach() - RISE[world][rank]
            projector.update(loss, weight=0.5, start_loss=start)
            (-0.5 * tiny.nll(forward, mine(60 + micro))).backward()
        projector.project_(retain_weight=0.3)
        with projector.guard(optimizer):
            optimizer.step()
        optimizer.zero_grad()
        projector.end_window()
        last = projector.last
        stats.append([last.kept, last.cos_before, last.cos_after, last.correction,
                      last.predicted, last.restoring])
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [tiny.flat(full).tolist(), stats]

found = {{}}
for kind in ("single", "ddp", "manual", "fsdp"):
    for granularity in ("per-tensor", "global"):
        found[kind + " " + granularity] = train(kind, granularity)
if rank == 0:
    print("RESULT", json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path) -> None:
    """DistributedDataParallel, averaging by hand, and FSDP2's shards, for both granularities."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(here=str(Path(__file__).parent)))
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(tmp_path / "store")],
            env=os.environ | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert all(p.returncode == 0 for p in processes), [errors[-2000:] for _, errors in outputs]
    line = next(x for x in outputs[0][0].splitlines() if x.startswith("RESULT"))
    found = json.loads(line.removeprefix("RESULT "))
    assert len(found) == 8
    for name, (values, stats) in found.items():
        expected, numbers = found["single " + name.split()[1]]
        assert values == pytest.approx(expected, rel=0, abs=1e-9), name
        for here, there in zip(stats, numbers, strict=True):
            assert here == pytest.approx(there, rel=1e-6, abs=1e-9), name
    assert found["single global"][0] != pytest.approx(found["single per-tensor"][0], abs=1e-6)
