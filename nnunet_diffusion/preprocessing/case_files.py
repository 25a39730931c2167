"""The files of a preprocessed case: arrays, and properties, which nnU-Net pickles.

A pickle could run any code; plain values cannot.
"""

import collections
import os
import pickle
from collections.abc import Iterable
from typing import Any

import blosc2
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


def open_array(path: str, remedy: str = REMEDY) -> blosc2.NDArray:
    """Opens an array as nnU-Net stores it, read when it is indexed.

    Raises:
        FileNotFoundError: If there is none.
        UserError: If it is damaged.
    """
    kwargs = {} if os.name == "nt" else {"mmap_mode": "r"}
    try:
        return blosc2.open(urlpath=path, mode="r", dparams={"nthreads": 1}, **kwargs)
    except FileNotFoundError:
        raise
    except Exception as error:  # blosc2 raises many kinds for a damaged file
        raise UserError(f"{path}: is damaged ({error}): {remedy}") from error


def read_preprocessed(path: str) -> np.ndarray:
    """Reads a whole array; the errors are those of `open_array`."""
    array = open_array(path)
    try:
        return array[:]
    except RuntimeError as error:
        raise UserError(f"{path}: is damaged ({error}): {REMEDY}") from error


def refuse_unreadable(folder: str, cases: Iterable[str]) -> None:
    """Reads all arrays of preprocessed cases, to name the one that a data loader stumbled over.

    Args:
        folder: Of preprocessed cases.
        cases: Those that were trained on.

    Raises:
        UserError: Naming the first array that is damaged; nothing if none is.
    """
    for path in (os.path.join(folder, case + ending) for case in cases for ending in (".b2nd", "_seg.b2nd")):
        if os.path.isfile(path):
            read_preprocessed(path)


def check_preprocessed(folder: str, cases: Iterable[str]) -> None:
    """Refuses preprocessed cases that are damaged or carry code, before nnU-Net's data loader opens them.

    nnU-Net unpickles the properties; what it would find wrong with an array is told by a worker process.

    Args:
        folder: Of preprocessed labeled cases.
        cases: Those to look at; each takes a millisecond or two.

    Raises:
        UserError: Naming the first file that is missing, damaged, or holds more than plain values.
    """
    for case in dict.fromkeys(cases):
        path = os.path.join(folder, case)
        try:
            load_properties(f"{path}.pkl")
            for ending in (".b2nd", "_seg.b2nd"):
                open_array(path + ending)
        except FileNotFoundError as error:
            raise UserError(f"{path}: is not preprocessed: run nnunet_diffusion plan_and_preprocess") from error
