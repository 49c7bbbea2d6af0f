"""A merge of LoRA adapters takes no more memory than its plan says."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import orthomerge
from orthomerge.adapters.memory import AdapterState
from orthomerge.recipe.run import plan

_SCRIPT = """
import sys, threading, time
import torch
from orthomerge.adapters.memory import AdapterState
from orthomerge.merging.run import run_plan
from orthomerge.recipe.run import plan

def held():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

key, (rows, columns, rank, models) = "base_model.model.q", map(int, sys.argv[1:5])
config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
adapters = []
for at in range(models):
    torch.manual_seed(at)
    B, A = torch.randn(rows, rank), torch.randn(rank, columns)
    tensors = {f"{key}.lora_B.weight": B, f"{key}.lora_A.weight": A}
    adapters.append(AdapterState(tensors, config, f"{at}"))
warm = torch.randn(8, 8).double()
torch.linalg.svd(warm), torch.linalg.qr(warm), torch.linalg.eigh(warm @ warm.mT)
prepared = plan(adapters, run_settings={"workers": 1}, **eval(sys.argv[5]))
before, peak, done = held(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, held())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
run_plan(prepared)
done = True
watcher.join()
print(peak - before, prepared.peak_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "settings",
    [{"method": "knots", "concatenate": "rows"}, {"axis": "out", "renormalise": True}],
)
def test_the_plan_says_how_much_memory_a_module_takes(settings) -> None:
    command = [sys.executable, "-c", _SCRIPT, "4096", "1024", "32", "8", repr(settings)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    used, planned = map(int, result.stdout.split())
    assert 0.3 * planned < used < planned


def test_a_base_is_not_counted_once_per_adapter() -> None:
    """Only a few rows of it are in memory, however many adapters there are."""
    key, config = "base_model.model.q", {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    size = 4096
    tensors = {
        f"{key}.lora_B.weight": torch.ones(size, 1),
        f"{key}.lora_A.weight": torch.ones(1, size),
    }
    base = {"q.weight": torch.zeros(size, size)}
    adapters = [AdapterState(tensors, config, f"{at}") for at in range(8)]
    settings = {"base": base, "method": "do-merging", "run_settings": {"workers": 1}}
    assert plan(adapters, **settings).peak_bytes < size * size * 4
    merged = orthomerge.merge(adapters, **settings).tensors["q.weight"]
    torch.testing.assert_close(merged, torch.ones_like(merged))
