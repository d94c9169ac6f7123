"""io.orbax_export."""

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


def save_orbax(checkpoint: HFFolder, new: Mapping[str, np.ndarray], out: Path) -> None:
    """The full edited model as an orbax checkpoint: flat {HF name: array}, HF layout, unstacked, in
    the checkpoint's dtypes, `config.json` beside it. Any JAX program restores it with any sharding:
    `orbax.checkpoint.StandardCheckpointer().restore(folder)`. Host memory holds a tensor at a time.
    Raises OSError when it cannot be written."""
    import orbax.checkpoint as ocp

    class OneByOne(ocp.type_handlers.NumpyHandler):  # itself it copies all arrays, then encodes all at once
        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                for written in await super().serialize([value.read()], [info], [arg]):
                    written.result()
            return []

    def leaf(name: str) -> Unread:
        info = checkpoint.tensors[name]
        read = functools.partial(read_tensor, checkpoint, name)
        return Unread(info.shape, np.dtype(NUMPY[info.dtype]), read if name not in new else lambda: new[name])

    types = ocp.type_handlers.create_type_handler_registry((Unread, OneByOne(deepcopy_host_arrays=False)))
    try:
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=types, multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as saver:
            saver.save(out.resolve(), args=ocp.args.PyTreeSave({n: leaf(n) for n in checkpoint.tensors}))
    except Exception as e:  # tensorstore has its own kinds for a full disk
        raise OSError(f"the orbax checkpoint could not be written: {reason(e)}") from None
    shutil.copy2(checkpoint.path / "config.json", out / "config.json")
