"""Updates that avoid what other texts need: the preconditioner, made of second moments on retained texts.

A change dW [out, in] alters the outputs on retained inputs x by tr(dW C dW^T), C = E[x x^T]. Every update
is multiplied on the input side by a matrix P [in, in], after Adam (editing/step.py):

    soft   P = lambda (C + lambda I)^-1, lambda = mean eigenvalue of C / strength
    null   P = the projection out of C's leading eigenvectors, which hold the share `strength` of its trace
    kfac   soft on both sides: also on the output side, with G = E[g g^T] [out, out] in place of C, where g is
           the gradient at the matrix's output of the log-likelihood of labels that the model itself draws

Of inputs and outputs too wide for a matrix the leading eigenvectors stand for C and G (`Leading`), and P is
the identity on all that is orthogonal to them."""

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from locft_jax import distributed
from locft_jax.config import Config
from locft_jax.data.records import digest
from locft_jax.editing.regularizers import second_moments as moments
from locft_jax.editing.regularizers.second_moments import Ids, Leading, Moment, Moments
from locft_jax.editing.regularizers.texts import preserves, source_of
from locft_jax.editing.step import LowRank, Side, Sides
from locft_jax.errors import UserError, reason
from locft_jax.io.atomic import whole_file
from locft_jax.logs import log
from locft_jax.model.model import Model
from locft_jax.model.sharding import fetch, place, replicated, tensor_spec
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import locate_tensor
from locft_jax.run_identity import base_digest, versions

DEFAULT_STRENGTH = {"soft": 10.0, "null": 0.9, "kfac": 1.0}
LAST_STRENGTH = 3.0  # of soft where the last tokens count: prompts' ends are more alike than words are
CACHE = 4 * 2**30  # bytes of all second moments on the disk

Lambdas = dict[str, dict[str, float]]  # HF name -> {"inputs": lambda, "outputs": lambda (kfac)}


def strength_of(config: Config) -> float | None:
    """The config's strength, or the method's default; None without a method."""
    prompts = (config.preserve, config.preserve_tokens) == ("soft", "last")
    default = LAST_STRENGTH if prompts else DEFAULT_STRENGTH.get(config.preserve)
    return default if config.preserve_strength is None else config.preserve_strength


def describe(config: Config, lambdas: Lambdas) -> dict[str, Any] | None:
    """Method, strength, lambdas, weight of the divergence and source, for reports and deltas; or None."""
    if not preserves(config):
        return None
    return {
        "method": config.preserve,
        "strength": strength_of(config) if config.preserve != "none" else None,
        "lambda": lambdas or None,
        "kl": config.preserve_kl or None,
        "source": source_of(config),
        "tokens": config.preserve_tokens,
    }


def check_preserve(spec: ModelSpec, site: Sequence[str], config: Config) -> None:
    """Raise UserError where `preserve` cannot work on this site; needs no weights."""
    if config.preserve == "none":
        return
    other = "use another rewrite_module, or preserve=none"
    keys = [locate_tensor(spec, name)[0].key for name in site]
    for name, key in zip(site, keys, strict=True):
        if key in ("embed", "head"):
            what = f"{name} is tuned, but {config.preserve} works on the matrices of layers only"
            raise UserError(f"preserve: {what}; {other}")
    if not moments.INPUTS.keys() & set(keys):
        raise UserError(f"preserve: the site holds no matrix; {other}")


def lambda_of(moment: np.ndarray | Leading, strength: float) -> float:
    """Mean eigenvalue / strength."""
    if isinstance(moment, Leading):
        return moment.trace / len(moment.vectors) / strength
    return float(np.trace(moment, dtype=np.float64)) / len(moment) / strength


def input_matrix(moment: np.ndarray | Leading, method: str, strength: float) -> np.ndarray | LowRank:
    """P of C, or of G, of one shape, float32 (module docstring); computed in float64. Of a wide moment `null`
    takes out all that is known where it holds less than the share `strength` of the trace."""
    scale = lambda_of(moment, strength) or 1
    if isinstance(moment, Leading):
        values = moment.values
        held = (np.cumsum(values) - values < strength * moment.trace).astype(np.float64)
        damp = held if method == "null" else values / (values + scale)
        return LowRank(moment.vectors, damp.astype(np.float32))
    c = np.asarray(moment, np.float64)
    if method != "null":  # an inverse, which takes a tenth of the time of an eigh
        return np.linalg.inv(np.eye(len(c)) + c / scale).astype(np.float32)
    values, vectors = np.linalg.eigh(c)
    values = np.maximum(values, 0)
    above = np.cumsum(values[::-1])[::-1] - values  # trace held by the larger ones
    kept = vectors[:, above >= strength * values.sum()]
    return (kept @ kept.T).astype(np.float32)


def side_shardings(mesh: Mesh, spec: ModelSpec, name: str) -> tuple[NamedSharding, NamedSharding]:
    """Shardings of P_in and P_out of a tensor: columns, and rows, as its own, so that updates keep their
    sharding; of a `LowRank` its basis, by its rows."""
    row, _ = locate_tensor(spec, name)
    rows, columns, *_ = *tensor_spec(mesh, spec, row, False), None, None
    inner = P(columns, None) if row.shape[1] > moments.EXACT else P(None, columns)
    return NamedSharding(mesh, inner), NamedSharding(mesh, P(rows, None))


def cached_moments(
    model: Model, site: Sequence[str], ids: Ids, config: Config, side: str, compute: Callable[[], Moments]
) -> Moments:
    """What `compute` gives, kept in `$XDG_CACHE_HOME/locft_jax/moments` (else `~/.cache/...`), a file for all
    that the moments follow from; the oldest make room, any may be deleted. A file that cannot be read or
    written is no error. Moments of a model that carries edits are not kept."""
    if model.overrides or distributed.several():
        return compute()
    key = {
        "side": side,
        "model": base_digest(model.folder, site),
        "weights": config.weights if model.int8 else str(model.dtype),
        "site": list(site),
        "texts": digest(ids),
        "tokens": config.preserve_tokens,
        "seed": config.seed if side == "outputs" else None,
        "mesh": dict(model.mesh.shape),
        "row_length": config.row_length,
        "architecture": digest([dataclasses.asdict(model.spec)]),
        "rule": [moments.RULE, moments.EXACT, moments.RANK, moments.PASSES],
        "versions": versions(),
    }
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "locft_jax" / "moments" / f"{digest([key])}.npz"
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return _read(path)
    found = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            _write(part, found)
        files = sorted(path.parent.glob("*.npz"), key=lambda p: p.stat().st_mtime, reverse=True)
        sizes = np.cumsum([p.stat().st_size for p in files])
        for old in [p for p, total in zip(files[1:], sizes[1:], strict=True) if total > CACHE]:
            old.unlink(missing_ok=True)
    except OSError as e:
        log.warning(f"second moments could not be kept in {path.parent} ({reason(e)})")
    return found


def _write(path: Path, moments: Moments) -> None:
    """Every moment once, and which names share it."""
    unique = {id(m): m for m in moments.values()}
    number = {key: str(i) for i, key in enumerate(unique)}
    arrays = {"names": np.array(json.dumps({name: number[id(m)] for name, m in moments.items()}))}
    for key, moment in unique.items():
        parts = dataclasses.asdict(moment) if isinstance(moment, Leading) else {"whole": fetch(moment)}
        arrays |= {f"{number[key]}.{part}": np.asarray(value) for part, value in parts.items()}
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _read(path: Path) -> Moments:
    with np.load(path, allow_pickle=False) as file:

        def moment(i: str) -> Any:
            if f"{i}.whole" in file:
                return file[f"{i}.whole"]
            return Leading(file[f"{i}.vectors"], file[f"{i}.values"], float(file[f"{i}.trace"]))

        names: dict[str, str] = json.loads(str(file["names"]))
        made = {i: moment(i) for i in dict.fromkeys(names.values())}
    return {name: made[i] for name, i in names.items()}


def make_preconditioner(
    model: Model, site: Sequence[str], config: Config, ids: Ids
) -> tuple[dict[str, Sides], Lambdas]:
    """{HF name: (P_in [in, in], P_out [out, out] or None)} for the site's matrices, {} when off; and their
    lambdas. The same arguments give the same bits, so a resumed run makes it again."""
    strength = strength_of(config)
    if config.preserve == "none" or strength is None:
        return {}, {}
    spec, mesh = model.spec, model.mesh
    given, last = (model, site, ids, config.row_length), config.preserve_tokens == "last"
    inner = cached_moments(model, site, ids, config, "inputs", lambda: moments.second_moments(*given, last))
    outer: Moments = {}
    if config.preserve == "kfac":
        gradients = lambda: moments.gradient_moments(*given, config.seed, last)  # noqa: E731
        outer = cached_moments(model, site, ids, config, "outputs", gradients)
    every = {id(m): m if isinstance(m, Leading) else fetch(m) for m in [*inner.values(), *outer.values()]}
    made = {i: input_matrix(m, config.preserve, strength) for i, m in every.items()}

    def sharded(moment: Moment, sharding: NamedSharding) -> Side:
        p = made[id(moment)]
        if isinstance(p, LowRank):
            return LowRank(place(p.basis, sharding), place(p.damp, replicated(mesh)))
        return place(p, sharding)

    found, lambdas = dict[str, Sides](), Lambdas()
    for name, moment in inner.items():
        columns, rows = side_shardings(mesh, spec, name)
        found[name] = sharded(moment, columns), sharded(outer[name], rows) if outer else None
        if config.preserve != "null":
            sides = {"inputs": moment} | ({"outputs": outer[name]} if outer else {})
            lambdas[name] = {side: lambda_of(every[id(m)], strength) for side, m in sides.items()}
    return found, lambdas
