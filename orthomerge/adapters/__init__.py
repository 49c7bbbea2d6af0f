"""What PEFT adapter files mean: configs, names, LoRA, OFT, BOFT, HRA, and the way out.

Importing this room imports neither torch nor PEFT; functions that need tensors import torch.
"""

from orthomerge.adapters.boft import BoftAdapter
from orthomerge.adapters.config import CONFIG_NAME, AdapterConfig, read_adapter_config
from orthomerge.adapters.convention import EXACT, Kind, OftConvention
from orthomerge.adapters.dora import dora_left_factor, dora_magnitudes, dora_scales
from orthomerge.adapters.effective import (
    BackMap,
    apply_left_rotation,
    apply_rotation,
    rotation,
)
from orthomerge.adapters.export import (
    MergedModule,
    common_convention,
    merged_oft_config,
    oft_config,
    stored_from_canonical,
)
from orthomerge.adapters.hra import HraAdapter
from orthomerge.adapters.keys import PREFIX, base_tensor_name, base_weight_name, strip_prefix
from orthomerge.adapters.lora import LoraAdapter, LoraModule
from orthomerge.adapters.lora_export import (
    diffusers_metadata,
    lora_config,
    lora_tensors,
    padded_factors,
)
from orthomerge.adapters.lora_files import read_lora_file
from orthomerge.adapters.lora_keys import lora_key, saved_key, saved_modules
from orthomerge.adapters.lora_renaming import FlattenedNames, converted_module
from orthomerge.adapters.lora_styles import LoraStyle
from orthomerge.adapters.memory import AdapterState, adapter_states, load_adapter_state
from orthomerge.adapters.negation import negated
from orthomerge.adapters.oft import OftAdapter, oft_key
from orthomerge.adapters.rotated import OftModule, RotationAdapter, TensorSource
from orthomerge.adapters.sizes import adjusted_divisor, common_setting
from orthomerge.adapters.updates import AdapterUpdates, WeightUpdate, adapter_updates

__all__ = [
    "CONFIG_NAME",
    "EXACT",
    "PREFIX",
    "AdapterConfig",
    "AdapterState",
    "AdapterUpdates",
    "BackMap",
    "BoftAdapter",
    "FlattenedNames",
    "HraAdapter",
    "Kind",
    "LoraAdapter",
    "LoraModule",
    "LoraStyle",
    "MergedModule",
    "OftAdapter",
    "OftConvention",
    "OftModule",
    "RotationAdapter",
    "TensorSource",
    "WeightUpdate",
    "adapter_states",
    "adapter_updates",
    "adjusted_divisor",
    "apply_left_rotation",
    "apply_rotation",
    "base_tensor_name",
    "base_weight_name",
    "common_convention",
    "common_setting",
    "converted_module",
    "diffusers_metadata",
    "dora_left_factor",
    "dora_magnitudes",
    "dora_scales",
    "load_adapter_state",
    "lora_config",
    "lora_key",
    "lora_tensors",
    "merged_oft_config",
    "negated",
    "oft_config",
    "oft_key",
    "padded_factors",
    "read_adapter_config",
    "read_lora_file",
    "rotation",
    "saved_key",
    "saved_modules",
    "stored_from_canonical",
    "strip_prefix",
]
