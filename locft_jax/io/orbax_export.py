"""The edited model as an orbax checkpoint, which any JAX program restores with any sharding."""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from locft_jax.errors import reason
from locft_jax.io.hf_folder import HFFolder, read_tensor
from locft_jax.io.safetensors_header import NUMPY


@dataclasses.dataclass(frozen=True)
class Unread:
    """A tensor to be read when its turn to be written has come."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def save_orbax(folder: HFFolder, new: Mapping[str, np.ndarray], out: Path) -> None:
    """Write the full edited model: flat {HF name: array}, HF layout, unstacked, in the stored dtypes,
    `config.json` beside it; `orbax.checkpoint.StandardCheckpointer().restore(out)` reads it. Host memory
    holds a tensor at a time. Raises OSError when it cannot be written."""
    import orbax.checkpoint as ocp

    # The handler itself copies all arrays, then encodes all at once.
    class OneByOne(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                for written in await super().serialize([value.read()], [info], [arg]):
                    written.result()
            return []

    def leaf(name: str) -> Unread:
        info = folder.tensors[name]
        read = functools.partial(read_tensor, folder, name)
        return Unread(info.shape, np.dtype(NUMPY[info.dtype]), (lambda: new[name]) if name in new else read)

    types = ocp.type_handlers.create_type_handler_registry((Unread, OneByOne(deepcopy_host_arrays=False)))
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=types, multiprocessing_options=alone)
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as saver:
            saver.save(out.resolve(), args=ocp.args.PyTreeSave({n: leaf(n) for n in folder.tensors}))
    except Exception as e:  # tensorstore has its own kinds for a full disk
        raise OSError(f"the orbax checkpoint could not be written: {reason(e)}") from None
    shutil.copy2(folder.path / "config.json", out / "config.json")
