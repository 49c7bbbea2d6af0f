"""What PEFT adapter files mean: configs, names, OFT in every supported format, and the way out.

Importing this room imports neither torch nor PEFT; functions that need tensors import torch.
"""

from orthomerge.adapters.config import CONFIG_NAME, AdapterConfig, read_adapter_config
from orthomerge.adapters.convention import EXACT, Kind, OftConvention
from orthomerge.adapters.effective import BackMap, apply_rotation, rotation
from orthomerge.adapters.export import (
    MergedModule,
    common_convention,
    merged_oft_config,
    stored_from_canonical,
)
from orthomerge.adapters.keys import PREFIX, base_tensor_name, base_weight_name, strip_prefix
from orthomerge.adapters.oft import OftAdapter, OftModule, TensorSource, oft_key
from orthomerge.adapters.sizes import adjusted_divisor, common_setting

__all__ = [
    "CONFIG_NAME",
    "EXACT",
    "PREFIX",
    "AdapterConfig",
    "BackMap",
    "Kind",
    "MergedModule",
    "OftAdapter",
    "OftConvention",
    "OftModule",
    "TensorSource",
    "adjusted_divisor",
    "apply_rotation",
    "base_tensor_name",
    "base_weight_name",
    "common_convention",
    "common_setting",
    "merged_oft_config",
    "oft_key",
    "read_adapter_config",
    "rotation",
    "stored_from_canonical",
    "strip_prefix",
]
