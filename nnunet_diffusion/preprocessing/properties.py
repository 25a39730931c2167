"""Properties of preprocessed cases: nnU-Net pickles them, and a pickle could run any code; plain values cannot."""

import collections
import pickle
from typing import Any

import numpy as np

from nnunet_diffusion.errors import UserError

REMEDY = "remove the case's files and run nnunet_diffusion plan_and_preprocess"
# numpy pickles arrays and scalars by these functions; before numpy 2 their modules had no underscore
FUNCTIONS = (np.zeros(1).__reduce__()[0], np.zeros(1).__reduce_ex__(5)[0], np.float64(0).__reduce__()[0])
MODULES = [(f, module) for f in FUNCTIONS for module in (f.__module__, f.__module__.replace("._core", ".core"))]
PLAIN = {(module, function.__name__): function for function, module in MODULES}
PLAIN |= {(kind.__module__, kind.__name__): kind for kind in (np.dtype, np.ndarray, collections.OrderedDict)}


class _PlainUnpickler(pickle.Unpickler):
    """Knows plain values, and numpy's arrays and scalars."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PLAIN:
            raise pickle.UnpicklingError(f"{module}.{name} is no plain value")
        return PLAIN[module, name]


def load_properties(path: str) -> dict[str, Any]:
    """Loads the properties of a preprocessed case without running any code that the file may carry.

    Args:
        path: Its .pkl.

    Raises:
        UserError: If the file is damaged, or holds more than plain values and arrays.
        OSError: If it cannot be read.
    """
    with open(path, "rb") as f:
        try:
            properties = _PlainUnpickler(f).load()
        except OSError:
            raise
        except Exception as error:  # a damaged pickle raises many kinds
            raise UserError(f"{path}: is damaged, or holds more than plain values ({error}): {REMEDY}") from error
    if not isinstance(properties, dict):
        raise UserError(f"{path}: holds a {type(properties).__name__}, no properties of a case: {REMEDY}")
    return properties
