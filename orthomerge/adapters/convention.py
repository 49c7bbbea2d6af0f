"""How the numbers of an OFT adapter are meant: exact Cayley map or series, and with which sign.

Read from the config alone; no tensor is looked at here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from orthomerge.adapters.config import AdapterConfig
from orthomerge.errors import AdapterError

__all__ = ["EXACT", "Kind", "OftConvention", "canonical_sign"]

Kind = Literal["linear", "embedding"]


@dataclass(frozen=True, slots=True)
class OftConvention:
    """How stored numbers become a rotation, and with which sign.

    Attributes:
        cayley_neumann: The rotation is a truncated series, and the sign is the opposite one.
        terms: PEFT's ``num_cayley_neumann_terms``; without the series it is the default, 5.
        legacy: The series is the one of PEFT 0.16 and 0.17.
    """

    cayley_neumann: bool = False
    terms: int = 5
    legacy: bool = False

    @classmethod
    def from_config(cls, config: AdapterConfig) -> OftConvention:
        """Read the convention of an adapter with packed storage.

        The series changed in PEFT 0.18, the first release that writes its version into the
        config; a config without one is older.

        Raises:
            AdapterError: A value has the wrong type, or the series has less than two terms.
        """
        if not config.value("use_cayley_neumann", bool, True):
            return EXACT
        terms = config.value("num_cayley_neumann_terms", int, 5)
        if terms < 2:
            raise AdapterError(
                "num_cayley_neumann_terms is too small: such an adapter rotates nothing",
                file=config.path,
                expected="at least 2",
                found=terms,
            )
        version = config.value("peft_version", str, "0.0")
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is None:
            raise AdapterError("peft_version is no version", file=config.path, found=version)
        return cls(True, terms, legacy=(int(numbers[1]), int(numbers[2])) < (0, 18))


#: The exact Cayley map, ``use_cayley_neumann`` false.
EXACT = OftConvention()


def canonical_sign(kind: Kind, convention: OftConvention) -> int:
    """Return s with ``A = s Q``: Q as stored, A such that the weight becomes ``W0 Cayley(A)``.

    PEFT's K is Cayley(-Q), or a series for Cayley(+Q) when ``cayley_neumann`` is set. A linear
    layer becomes W0 K^T, an embedding E K, so the two flags and the two kinds each flip the sign.
    Pinned against PEFT itself by ``test_dense_weight_equals_peft_merge``.

    >>> canonical_sign("linear", EXACT), canonical_sign("embedding", EXACT)
    (1, -1)
    """
    return 1 if (kind == "linear") != convention.cayley_neumann else -1
