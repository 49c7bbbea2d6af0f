"""Two processes with half the batch each take the steps of one process with the whole batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import json, sys, torch
sys.path[:0] = {paths!r}
from trainer_runs import even_rows, tiny_model, trained, uneven_rows, unlearn_trainer
case = json.loads(sys.argv[1])
import os
several = int(os.environ.get("WORLD_SIZE", "1")) > 1
model = tiny_model(torch.float64, lora=case["lora"])
projection = None
if case["projected"]:
    if several:
        from accelerate import PartialState
        PartialState(cpu=True)
    projection = {{"rows": ("batch", "bank"), "row_dtype": torch.float64, "refresh_every": 2,
                  "process_group": torch.distributed.group.WORLD if several else None}}
if case.get("forgotten_group"):
    projection["process_group"] = None
rows = uneven_rows(2, 16)
trainer, watch = unlearn_trainer(
    case["folder"], model, uneven_rows(1, 16), rows, objective=case["objective"],
    projection=projection, weights=(1.0, 0.5), max_steps=5, optim="adamw_torch",
    learning_rate=3e-3, max_grad_norm=0.5, per_device_train_batch_size=case["size"],
    gradient_accumulation_steps=2, ddp_backend="gloo" if several else None,
)
if case["projected"]:
    from orthomerge.unlearning.data import collate_rows
    def group(start):
        def losses():
            batch = {{"retain": collate_rows(1)([rows[i] for i in range(start, 16, 3)])}}
            yield trainer.objective.retain_loss(model, None, batch), 1.0
        return losses
    trainer.projector.set_bank([group(s) for s in range(3)])
    trainer._start_loss = lambda batch: 3.3
if case.get("poisoned") and int(os.environ.get("RANK", "0")) == 1:
    real = trainer.objective.forget_loss
    trainer.objective.forget_loss = lambda *a: real(*a) * float("nan")
trainer.train()
rank = int(os.environ.get("RANK", "0"))
torch.save({{
    "weights": {{n: p.detach() for n, p in trained(model).items()}}, "parts": trainer.parts,
    "stats": None if projection is None else trainer.projector.last.as_dict(),
    "projections": None if projection is None else trainer.projector.projections,
}}, f"{{case['folder']}}/found-{{rank}}.pt")
if several:
    torch.distributed.destroy_process_group()
"""


def started(case, processes, folder: Path):
    """Run the script in so many processes; return what each of them found, or their errors."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = SCRIPT.format(paths=[str(Path(__file__).parent)])
    case = {**case, "folder": str(folder), "size": 8 // processes // 2}
    running = []
    for rank in range(processes):
        environment = dict(os.environ)
        if processes > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
                "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
        command = [sys.executable, "-c", script, json.dumps(case)]
        running.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    errors = [process.communicate(timeout=200)[1] for process in running]
    if any(process.returncode for process in running):
        return None, errors
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(processes)], errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"projected": False, "lora": False, "objective": "grad-diff"},
        {"projected": True, "lora": False, "objective": "simnpo"},
        {"projected": True, "lora": True, "objective": "grad-diff"},
    ],
    ids=["off", "full", "lora"],
)
def test_two_processes_equal_one(case, tmp_path):
    one, errors = started(case, 1, tmp_path / "one")
    assert one is not None, errors
    two, errors = started(case, 2, tmp_path / "two")
    assert two is not None, errors
    for name, expected in one[0]["weights"].items():
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name]), name
        torch.testing.assert_close(two[0]["weights"][name], expected, rtol=1e-6, atol=1e-8)
    assert two[0]["parts"] == pytest.approx(one[0]["parts"], rel=1e-6)
    assert two[0]["parts"] == two[1]["parts"]
    if case["projected"]:
        assert [found["projections"] for found in (*one, *two)] == [5, 5, 5]
        for key in ("kept", "restoring", "cos_before", "cos_after", "predicted"):
            assert two[0]["stats"][key] == pytest.approx(one[0]["stats"][key], rel=1e-4), key
        assert one[0]["stats"]["restoring"] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("forgotten_group", "the projector does not know of the other processes"),
        ("poisoned", "the forget loss is not finite at step 1"),
    ],
)
def test_all_processes_stop_together(mistake, words, tmp_path):
    case = {"projected": True, "lora": False, "objective": "grad-diff", mistake: True}
    found, errors = started(case, 2, tmp_path / "two")
    assert found is None
    assert all(words in error for error in errors), errors
