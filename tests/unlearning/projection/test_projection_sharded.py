"""Several processes: averaged rows and sharded sums give what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

SCRIPT = """
import json, os, sys
sys.path.insert(0, {here!r})
import torch, torch.distributed as dist
import tiny_projection as tiny
from orthomerge.unlearning import RetainProjector
torch.set_num_threads(1)
kind, store = sys.argv[1], sys.argv[2]
world = 1 if kind == "single" else 2
rank = int(os.environ.get("RANK", 0))
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
torch.manual_seed(0)
model = tiny.TinyTransformer().double()
if kind == "fsdp":
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
forward = model
if kind == "ddp":
    forward = torch.nn.parallel.DistributedDataParallel(model)
shared = dict(row_dtype=torch.float64, history=2, refresh_every=2, granularity={granularity!r})
if kind in ("ddp", "manual"):
    shared["process_group"] = dist.group.WORLD
if kind == "fsdp":
    shared["sharded"] = True
projector = RetainProjector(model, **shared)
def mine(seed):
    rows = tiny.batch(seed, rows=8)
    return rows if world == 1 else rows.chunk(world)[rank]
projector.set_bank([lambda s=s: [(tiny.nll(forward, mine(s)), 1.0)] for s in (20, 21)])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=False)
# The mean over the processes is what one process has.
RISE = {{1: [0.003], 2: [0.002, 0.004]}}
stats = []
for step in range(4):
    for micro in range(2):
        loss = tiny.nll(forward, mine(40 + 2 * step + micro))
        projector.update(loss, weight=0.5, start_loss=loss.detach() - RISE[world][rank])
        (-0.5 * tiny.nll(forward, mine(60 + micro))).backward()
    projector.project_(retain_weight=0.3)
    with projector.guard(optimizer):
        optimizer.step()
    optimizer.zero_grad()
    projector.end_window()
    last = projector.last
    stats.append([last.kept, last.cos_before, last.cos_after, last.correction, last.predicted])
full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
if rank == 0:
    print("RESULT", json.dumps([tiny.flat(full).tolist(), stats]))
dist.destroy_process_group()
"""


def run(kind: str, folder: Path, granularity: str = "per-tensor"):
    world = 1 if kind == "single" else 2
    script = folder / "script.py"
    script.write_text(SCRIPT.format(here=str(HERE), granularity=granularity))
    store = folder / f"store-{kind}-{granularity}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), kind, str(store)],
            env=os.environ | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(p.returncode == 0 for p in processes), outputs[0][1][-2000:] + outputs[-1][1][-2000:]
    line = next(x for x in outputs[0][0].splitlines() if x.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT "))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return {g: run("single", folder, g) for g in ("per-tensor", "global")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "granularity"),
    [("ddp", "per-tensor"), ("manual", "global"), ("fsdp", "per-tensor"), ("fsdp", "global")],
)
def test_processes_agree_with_one(kind, granularity, single, tmp_path) -> None:
    values, stats = run(kind, tmp_path, granularity)
    expected, numbers = single[granularity]
    assert max(abs(a - b) for a, b in zip(values, expected, strict=True)) < 1e-9
    for found, one in zip(stats, numbers, strict=True):
        assert found == pytest.approx(one, rel=1e-6, abs=1e-9)
